"""Networks, storage and GPUs: what goes through them goes one after the other."""

from __future__ import annotations


class Line:
    """Carries so much in a second.

    Args:
        rate: bytes, or requests, a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._free_s = rate, 0.0
        self.total = 0.0

    def take(self, now: float, amount: float) -> float:
        """Put an amount on, behind what is there; return when it is through."""
        self._free_s = max(now, self._free_s) + amount / self._rate
        self.total += amount
        return self._free_s


class Network:
    """A machine's way in and out."""

    def __init__(self, bytes_s: float) -> None:
        self.inward, self.outward = Line(bytes_s), Line(bytes_s)


class ObjectStorage:
    """Bounds what all machines read and write together.

    Args:
        bytes_s: a second.
        requests_s: a second.
        latency_s: of each request.
        stream_bytes_s: of one reader or writer.
        part_bytes: of a request.
    """

    def __init__(
        self, bytes_s: float, requests_s: float, latency_s: float, stream_bytes_s: float, part_bytes: float
    ) -> None:
        self.bytes, self._requests = Line(bytes_s), Line(requests_s)
        self.latency_s, self._stream_bytes_s, self._part_bytes = latency_s, stream_bytes_s, part_bytes

    def end_s(self, now: float, line: Line, num_bytes: float) -> float:
        """Read or write through a machine's line; return when it is done."""
        ends = (
            self._requests.take(now, 1 + num_bytes // self._part_bytes),
            self.bytes.take(now, num_bytes),
            line.take(now, num_bytes),
            now + num_bytes / self._stream_bytes_s,
        )
        return max(ends) + self.latency_s


def move(now: float, num_bytes: float, source: Network, target: Network) -> float:
    """Move bytes between two machines; return when they are there."""
    return max(source.outward.take(now, num_bytes), target.inward.take(now, num_bytes))

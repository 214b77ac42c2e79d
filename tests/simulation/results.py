"""Stand-ins for Ray's references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Awaited:
    """Something that the driver may wait for."""

    done = False

    def __init__(self) -> None:
        self.on_done: Callable[[], None] | None = None

    def _came(self) -> None:
        if self.on_done is not None:
            self.on_done()


class Ref(Awaited):
    """A result that comes, or has come.

    Attributes:
        is_sum: whether it is what the driver never fetches.
        lost: with its machine.
        home: the actor that made it.
    """

    def __init__(self, is_sum: bool = False) -> None:
        super().__init__()
        self.is_sum, self.lost, self.home = is_sum, False, None
        self.value: Any = None
        self.error: BaseException | None = None

    def set(self, value: Any = None, error: BaseException | None = None, home: Any = None) -> None:
        if not self.done:
            self.done, self.value, self.error, self.home = True, value, error, home
            self._came()


class Stream(Awaited):
    """The results of a step that is done once."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Ref] = []
        self.ended = False

    @property
    def done(self) -> bool:  # type: ignore[override]
        return self.ended or bool(self.items)

    def set(self, value: Any = None, error: BaseException | None = None, home: Any = None) -> None:
        if not self.ended:
            self.items.append(Ref())
            self.items[-1].set(value, error, home)
            self.ended = True
            self._came()

    def __next__(self) -> Ref:
        if not self.items:
            raise StopIteration
        return self.items.pop(0)


class Waiting:
    """Counts what comes of some references while the driver waits for them."""

    def __init__(self, refs: Sequence[Awaited], number: int) -> None:
        self._refs, self.missing = refs, number - sum(1 for ref in refs if ref.done)

    def __enter__(self) -> Waiting:
        if self.missing > 0:
            for ref in self._refs:
                ref.on_done = self._count
        return self

    def __exit__(self, *_: object) -> None:
        for ref in self._refs:
            ref.on_done = None

    def _count(self) -> None:
        self.missing -= 1

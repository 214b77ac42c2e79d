"""Stand-ins for Ray's references."""

from __future__ import annotations

from typing import Any


class Awaited:
    """Something that the driver may wait for."""

    num_came = 0
    """Of all of them: whoever waits looks again when it has grown."""

    def __init__(self) -> None:
        self.done = False

    def _came(self) -> None:
        self.done = True
        Awaited.num_came += 1


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
            self.value, self.error, self.home = value, error, home
            self._came()


class Stream(Awaited):
    """The results of a step that is done once."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Ref] = []

    def set(self, value: Any = None, error: BaseException | None = None, home: Any = None) -> None:
        if not self.done:
            self.items.append(Ref())
            self.items[-1].set(value, error, home)
            self._came()

    def __next__(self) -> Ref:
        if not self.items:
            raise StopIteration
        return self.items.pop(0)

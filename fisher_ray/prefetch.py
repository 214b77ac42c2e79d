"""One background thread that stays a bounded number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetch(items: Generator[T, None, None], depth: int = 2) -> Generator[T, None, None]:
    """Yield ``items``, computed in one thread at most ``depth`` items ahead.

    The thread starts with the first item asked for. It has ended when this generator is exhausted, raises or is closed:
    closing waits for the item that is being computed. An exception in ``items`` is raised at its place.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fisher-ray-prefetch")
    try:
        ahead: deque[Future[T]] = deque(executor.submit(next, items, _END) for _ in range(depth))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(executor.submit(next, items, _END))
            yield item
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        items.close()

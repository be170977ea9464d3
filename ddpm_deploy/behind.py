"""Calls that are made behind the caller's work: files are written while a network runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Behind(Generic[T]):
    """Makes calls in a thread, one after the other, in the order in which they were begun.

    After one that fails none is made any more. A context: at its end, also after an error or
    Ctrl-C, those that were begun are made and the thread has ended.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._begun: deque[Future[T]] = deque()
        self._failed: BaseException | None = None

    def begin(self, call: Callable[[], T]) -> None:
        """Has a call made, and returns at once."""
        self._begun.append(self._pool.submit(self._make, call))

    def done(self) -> Iterator[T]:
        """Yields the results that are there and were not yielded yet, in order.

        Raises:
            Exception: What the call that is next raised.
        """
        while self._begun and self._begun[0].done():
            yield self._begun.popleft().result()

    def rest(self) -> Iterator[T]:
        """Waits for every call that was begun, and yields the results not yielded yet.

        Raises:
            Exception: As from `done`.
        """
        while self._begun:
            yield self._begun.popleft().result()

    def _make(self, call: Callable[[], T]) -> T:
        if self._failed is not None:
            raise self._failed
        try:
            return call()
        except BaseException as error:
            self._failed = error
            raise

    def __enter__(self) -> Behind[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

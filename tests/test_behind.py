from __future__ import annotations

import threading
from functools import partial

import pytest

from ddpm_deploy.behind import Behind


def test_calls_are_made_in_order_and_their_results_told_once() -> None:
    with Behind[int]("test") as behind:
        for n in range(50):
            behind.begin(partial(int, n))
        told = [*behind.done()]
        told += behind.rest()
        assert told == list(range(50))
        assert [*behind.done(), *behind.rest()] == []


def test_a_call_does_not_wait_for_the_one_before() -> None:
    may = threading.Event()
    with Behind[bool]("test") as behind:
        behind.begin(partial(may.wait, 60))
        behind.begin(lambda: True)
        assert list(behind.done()) == []
        may.set()
        assert list(behind.rest()) == [True, True]


def test_none_is_made_after_one_that_failed() -> None:
    made: list[int] = []

    def call(n: int) -> int:
        if n == 2:
            raise OSError("the disk is full")
        made.append(n)
        return n

    with Behind[int]("test") as behind:
        for n in range(5):
            behind.begin(partial(call, n))
        results = behind.rest()
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(OSError, match="the disk is full"):
            next(results)
    assert made == [0, 1]


def test_what_was_begun_is_made_after_an_error_elsewhere_and_the_thread_ends() -> None:
    made: list[int] = []

    def interrupted() -> None:
        with Behind[None]("test") as behind:
            for n in range(5):
                behind.begin(partial(made.append, n))
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert made == [0, 1, 2, 3, 4]
    assert threading.active_count() == before

"""Forked processes: their answers, and what is said of one that fails, is killed or hangs."""

import os
import signal
import time

import pytest

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.console.forked import Forks


def counts(first, count):
    for number in range(first, first + count):
        yield number, os.getpid()


def fails():
    yield "first"
    raise KeyError("lost")


def refuses():
    raise UserError("this is refused.\n  Use that.")
    yield


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def aborts():
    os.abort()
    yield


def leaves():
    os._exit(3)
    yield


def hangs():
    yield os.getpid()
    time.sleep(600)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_answers_of_all_processes_come_out_with_their_names():
    found = {"a": [], "b": []}
    with Forks() as forks:
        forks.start("a", counts, 0, 3)
        forks.start("b", counts, 10, 2)
        while (answer := forks.next(60)) is not None:
            found[answer[0]].append(answer[1])
        assert len(forks) == 0
    assert [number for number, _ in found["a"]] == [0, 1, 2] and [number for number, _ in found["b"]] == [10, 11]
    assert found["a"][0][1] not in (os.getpid(), found["b"][0][1])


@pytest.mark.parametrize(
    "target, message",
    [
        (refuses, "this is refused.\n  Use that."),
        (is_killed, "the process of rank 1 was ended by SIGKILL before it had an answer.\n  It is sent most often for"),
        (aborts, "the process of rank 1 was ended by SIGABRT before it had an answer.\n  Its Python stack stands in"),
        (leaves, "the process of rank 1 ended with 3 before it had an answer."),
    ],
)
def test_a_process_that_ends_without_its_answers_is_named_and_the_others_end(target, message):
    with pytest.raises(UserError) as error, Forks() as forks:
        forks.start("rank 0", hangs)
        _, pid = forks.next(60)
        forks.start("rank 1", target)
        forks.next(60)
    assert str(error.value).startswith(message)
    assert not is_alive(pid)


def test_no_more_processes_run_at_a_time_than_asked_for():
    found = []
    with Forks(at_most=1) as forks:
        for first in (0, 10, 20):
            forks.start(str(first), counts, first, 2)
        assert len(forks) == 3
        while (answer := forks.next(60)) is not None:
            found.append(answer[1][0])
    assert found == [0, 1, 10, 11, 20, 21]


def test_an_error_names_its_kind_and_its_place():
    with pytest.raises(UserError, match=r"^KeyError: 'lost' \(test_forked.py, line \d+\)$"), Forks() as forks:
        forks.start("rank 0", fails)
        assert forks.next(60) == ("rank 0", "first")
        forks.next(60)


def test_a_hang_is_said_to_be_one():
    with pytest.raises(UserError, match=r"^no process has answered for 1 s: one of 1 hangs\.$"), Forks() as forks:
        forks.start("rank 0", hangs)
        forks.next(60)
        forks.next(1)

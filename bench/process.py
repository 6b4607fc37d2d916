"""A process of its own that answers, one question after another, so that what it does is not disturbed by this one."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from ablations.isolation import ProcessLost, process_context


@contextmanager
def answers(name: str, begin: Callable[..., Callable[..., Any]], *work: Any) -> Generator[Callable[..., Any]]:
    """A function that asks a new process, which ends when the context is left.

    The process has as many threads as this one. It calls `begin(*work)`, and what that returns with the words of each
    question. Its errors are raised here, and ProcessLost where it dies; `name` is what that calls it.
    """
    context = process_context()
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, torch.get_num_threads(), begin, *work))
    process.start()
    there.close()

    def ask(*words: object) -> Any:
        try:
            here.send(words)
            answer = here.recv()
        except (EOFError, OSError):
            process.join()
            raise ProcessLost(f"the process of {name} ended with status {process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield ask
    finally:
        here.close()
        process.join()


def _answer(asked: Connection, threads: int, begin: Callable[..., Callable[..., Any]], *work: Any) -> None:
    """The process: answers what arrives with what came of it or with its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    torch.set_num_threads(threads)
    with asked, suppress(EOFError):
        answer_to = begin(*work)
        while True:
            words = asked.recv()
            try:
                answer = answer_to(*words)
            except Exception as error:
                answer = error
            asked.send(answer)

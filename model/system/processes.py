"""Processes of our own: how they start and end, and one that answers questions, undisturbed by this one."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


class ProcessLost(OSError):
    """The process died, and no trial is to blame. The command line prints it in one line."""


def process_context(imports: str) -> "SpawnContext | ForkServerContext":
    """How processes are made that compute. In Linux they are forked from a server, which imports PyTorch once.

    The server starts with the first of them, and then imports the module that is named. It neither computes nor looks
    for a GPU: neither CUDA nor OpenMP survive a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(["expertgrid.model.system.server", imports])
    return multiprocessing.get_context("forkserver")


@contextmanager
def answers(name: str, begin: Callable[..., Callable[..., Any]], *work: Any) -> Generator[Callable[..., Any]]:
    """A function that asks a new process, which ends when the context is left.

    The process has as many threads as this one. It calls `begin(*work)`, and what that returns with the words of each
    question. Its errors are raised here, and ProcessLost where it dies; `name` is what that calls it.
    """
    import torch  # not for the command line, which needs the errors here alone

    context = process_context("torch")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, torch.get_num_threads()))
    process.start()
    there.close()
    with suppress(OSError):  # the first question says so
        here.send((begin, *work))  # not with the start, which a signal may cut short

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
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        here.close()
        process.join()


def _answer(asked: Connection, threads: int) -> None:
    """The process: answers what arrives with what came of it or with its error."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server ignores it
    torch.set_num_threads(threads)
    with asked, suppress(EOFError, OSError):  # the process that asks has ended
        begin, *work = asked.recv()
        answer_to = begin(*work)
        while True:
            words = asked.recv()
            try:
                answer = answer_to(*words)
            except Exception as error:
                answer = error
            asked.send(answer)


def end_with_parent() -> None:
    """Ends this process of `multiprocessing` when the process that asked for it ends, however that ends.

    Linux's own signal for it comes with the end of the thread that started the process, or of the server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is for a process of multiprocessing"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()

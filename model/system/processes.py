"""Processes of our own: how they start and end, and how this one asks them, undisturbed by them."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expertgrid.model.system.server import SAFE_PATH

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


class ProcessLost(OSError):
    """The process died, and no trial is to blame. The command line prints it in one line."""


def process_context(imports: str) -> "SpawnContext | ForkServerContext":
    """How processes are made that compute. In Linux they are forked from a server, which imports PyTorch once.

    The server starts with the first call, and then imports the module that is named. It neither computes nor looks
    for a GPU: neither CUDA nor OpenMP survive a fork. It does not look for modules in the working directory.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # Windows has none

    multiprocessing.set_forkserver_preload(["expertgrid.model.system.server", imports])
    os.environ.setdefault("PYTHONSAFEPATH", SAFE_PATH)
    try:
        forkserver.ensure_running()
    finally:
        if os.environ["PYTHONSAFEPATH"] == SAFE_PATH:
            del os.environ["PYTHONSAFEPATH"]
    return multiprocessing.get_context("forkserver")


class AnsweringProcess:
    """Another process, which answers one question after another until it is ended or this process ends.

    It calls `begin(*work, *shared)` first, and the function that this returns with `send` and the words of each
    question. What that sends arrives at `connection`, and the error that it raises. `shared` is memory that both see,
    which only a new process can take.
    """

    def __init__(
        self, imports: str, begin: Callable[..., Callable[..., object]], *work: Any, shared: Sequence[Any] = ()
    ):
        context = process_context(imports)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(theirs, *shared))
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:  # a process that starts runs the file of `__main__`, and a user's script would begin again in each
            self.process.start()
        finally:
            sys.modules["__main__"] = main
        theirs.close()
        self.ask(begin, *work)  # not with the start, which a signal may cut short

    def ask(self, *words: object) -> None:
        """Sends a question. Where the process is lost, receiving the answer says so."""
        with suppress(OSError):
            self.connection.send(words)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _answer(connection: Connection, *shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    _end_with_parent()
    with connection, suppress(EOFError, ConnectionError):  # the parent needs it no more
        begin, *work = connection.recv()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server ignores it
        answer = begin(*work, *shared)
        while True:
            words = connection.recv()
            try:
                answer(connection.send, *words)
            except (Exception, KeyboardInterrupt) as error:
                connection.send(error)


def _end_with_parent() -> None:
    """Ends this process of `multiprocessing` when the process that asked for it ends, however that ends.

    Linux's own signal for it comes with the end of the thread that started the process, or of the server.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is for a process of multiprocessing"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def answers(name: str, begin: Callable[..., Callable[..., Any]], *work: Any) -> Generator[Callable[..., Any]]:
    """A function that asks a new process, which ends when the context is left.

    The process has as many threads as this one. It calls `begin(*work)`, and what that returns with the words of each
    question. Its errors are raised here, and ProcessLost where it dies; `name` is what that calls it.
    """
    import torch  # not for the command line, which needs the errors here alone

    apart = AnsweringProcess("torch", _begin_with_threads, torch.get_num_threads(), begin, *work)

    def ask(*words: object) -> Any:
        apart.ask(*words)
        try:
            answer = apart.connection.recv()
        except (EOFError, OSError):
            apart.process.join()
            raise ProcessLost(f"the process of {name} ended with status {apart.process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        yield ask
    except KeyboardInterrupt:
        apart.process.terminate()
        raise
    finally:
        apart.connection.close()
        apart.process.join()


def _begin_with_threads(threads: int, begin: Callable[..., Callable[..., Any]], *work: Any) -> Callable[..., object]:
    import torch

    torch.set_num_threads(threads)
    answer_to = begin(*work)
    return lambda send, *words: send(answer_to(*words))

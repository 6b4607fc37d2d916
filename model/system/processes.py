"""Processes of our own: how they start and end, and how this one asks them, undisturbed by them."""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_sharer
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expertgrid.model.system.errors import reason_of
from expertgrid.model.system.server import SAFE_PATH, SIGNALS, leave_safe_path

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

END_S = 10.0  # that a process gets to end by itself, and the system to tell that it has ended
QUIET = "ignore:resource_tracker"  # multiprocessing's tracker frees what a killed process leaves, and warns of it
LOST_SERVER = 255  # multiprocessing's exit status of a process whose server was killed: it may well go on
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process


class ProcessLost(OSError):
    """The process died, and no trial is to blame. The command line prints it in one line."""


def process_context(imports: str) -> "SpawnContext | ForkServerContext":
    """How processes are made that compute. In Linux they are forked from a server, which imports PyTorch once.

    The server starts with the first call, and again where it was killed, and then imports the module that is named. It
    neither computes nor looks for a GPU: neither CUDA nor OpenMP survive a fork. It does not look for modules in the
    working directory.
    """
    _renew_folder()
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker  # Windows has none

    if QUIET not in sys.warnoptions:  # with which the tracker is started
        sys.warnoptions.append(QUIET)
    multiprocessing.set_forkserver_preload(["expertgrid.model.system.server", imports])
    with _safe_path():
        resource_tracker.ensure_running()  # first: it takes the signals back
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the server ignores them
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _signal_server("SIGCONT")  # it may have been stopped, and nobody else continues it
    return multiprocessing.get_context("forkserver")


@atexit.register  # later than multiprocessing does, so that it is called before
def _renew_folder() -> None:
    """Makes multiprocessing's temporary folder again where somebody has removed it. It is also removed at the end."""
    folder = multiprocessing.current_process()._config.get("tempdir")  # ty: ignore[missing-attribute]
    if folder and not os.path.isdir(folder):
        with suppress(OSError):  # then no process can start, or there is nothing to remove
            os.makedirs(folder, mode=0o700, exist_ok=True)
        shares: Any = resource_sharer._resource_sharer  # ty: ignore[missing-attribute]
        if shares._listener is not None:  # its socket was in the folder: the next tensor makes another
            with suppress(OSError):
                shares._listener.close()
            shares._listener = shares._address = None


@contextmanager
def _safe_path() -> Generator[None]:
    """Processes that start within look for no modules in the working directory."""
    os.environ.setdefault("PYTHONSAFEPATH", SAFE_PATH)
    try:
        yield
    finally:
        leave_safe_path()


def _signal_server(name: str) -> int | None:
    """Sends the server a signal. Returns its process id, None where there is no server."""
    forkserver: Any = sys.modules.get("multiprocessing.forkserver")
    pid: int | None = forkserver and forkserver._forkserver._forkserver_pid
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[name])
    return pid


class AnsweringProcess:
    """Another process, which answers one question after another until it is ended or this process ends.

    It calls `begin(*work, *shared)` first, and the function that this returns with `send` and the words of each
    question. What that sends arrives at `connection`, and the error that it raises. `shared` is memory that both see,
    which only a new process can take.
    """

    def __init__(
        self, imports: str, begin: Callable[..., Callable[..., object]], *work: Any, shared: Sequence[Any] = ()
    ):
        for again in (True, False):
            context = process_context(imports)
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_answer, args=(theirs, *shared))
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:  # a process that starts runs the file of `__main__`, and a user's script would begin again in each
                with theirs, _safe_path():
                    self.process.start()
                break
            except (OSError, EOFError) as error:  # the server is dying, or its socket was removed
                self.connection.close()
                if not (again and (pid := _signal_server("SIGKILL"))):
                    raise ProcessLost(f"no process can be started: {reason_of(error)}") from error
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # multiprocessing itself looks for its end
            finally:
                sys.modules["__main__"] = main
        self.ask(begin, *work)  # not with the start, which a signal may cut short

    def ask(self, *words: object) -> None:
        """Sends a question. Where the process is lost, receiving the answer says so."""
        with suppress(OSError):
            self.connection.send(words)

    def signal(self, signum: int) -> None:
        """Sends a signal, also where the server, which tells that the process has ended, was killed."""
        if self.process.exitcode in (None, LOST_SERVER):
            assert self.process.pid is not None  # it was started
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)

    def end(self) -> None:
        """Ends the process, whatever it does, and whatever became of its server."""
        self.signal(KILL)
        _signal_server("SIGCONT")
        self.process.join(END_S)
        self.connection.close()


def _answer(connection: Connection, *shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the parent decides
    leave_safe_path()
    _end_with_parent()
    with suppress(OSError):  # where memory runs out, Linux ends this process rather than the command
        Path("/proc/self/oom_score_adj").write_text("500")  # of 1000
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
            apart.process.join(END_S)
            raise ProcessLost(f"the process of {name} ended with status {apart.process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        yield ask
    except KeyboardInterrupt:
        apart.end()
        raise
    finally:
        apart.connection.close()
        apart.process.join(END_S)
        apart.end()


def _begin_with_threads(threads: int, begin: Callable[..., Callable[..., Any]], *work: Any) -> Callable[..., object]:
    import torch

    torch.set_num_threads(threads)
    answer_to = begin(*work)
    return lambda send, *words: send(answer_to(*words))

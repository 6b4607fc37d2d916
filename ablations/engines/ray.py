"""Trials as tasks of a Ray cluster, whose nodes share no file system with this process, the driver.

A task trains one trial in a process apart, as the local engine does, and in a study directory of its own. It streams
what happens, and the files that change, to the driver. Ray chooses the node.

The packages of expertgrid are sent to the nodes (runtime_env's py_modules), so that all records come from the driver's
code, whatever version a node has. What expertgrid depends on must be installed there. No usage statistics are sent,
and an embedded cluster shows no dashboard.
"""

import asyncio
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING, Any

from expertgrid.ablations.engines.events import Event, StateSaved, Stopped, TrialDone, TrialFailed
from expertgrid.ablations.engines.isolation import Pool, Setup
from expertgrid.ablations.engines.scheduling import Message, NodeLost, Report, crashed, schedule
from expertgrid.ablations.records.directory import TRACEBACK, StudyDirectory
from expertgrid.model.probe import NETWORK
from expertgrid.model.system.errors import InputError, reason_of, reason_with_place
from expertgrid.model.system.files import write_whole
from expertgrid.model.system.machine import checkout_commit, usable_cores
from expertgrid.model.system.processes import ProcessLost
from expertgrid.model.training.trial import Trial

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator
    from ray.actor import ActorHandle

# Read when Ray is imported. Else, where `uv run` started the driver, Ray runs that command on all nodes, and it fails.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

NOT_SENT = ["__pycache__", "/ablations/studies/*/", "/bench/results"]  # of the package: records
WAITING = 16  # tasks, at least, that are submitted beyond those that run: the next ones, and a call for more nodes
LOOK_AT_NODES_S = 2.0
ANSWER_S = 5.0  # in which a node that is there accepts a connection
ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
EMBEDDED = "local"  # as Ray calls it
NODE_LOST = NodeLost("its node was lost")


@contextmanager
def ray_engine(
    address: str, cpus: int, gpus: float | None, device: str, modules: Sequence[str]
) -> Generator["RayEngine"]:
    """An engine on the cluster at `address`; with "auto" on that of RAY_ADDRESS, or an embedded one.

    A trial gets so many CPUs, and so much of a GPU: with None a whole one where the cluster has some and `device`
    allows it. `modules`, as --import names them, are sent to the nodes and imported there. Raises InputError where Ray
    is not installed, where no cluster is found, and for what a trial needs and `device` or the cluster do not give.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or EMBEDDED
    if address != EMBEDDED and not ADDRESS.fullmatch(address):
        raise InputError(f"--address {address}: auto or HOST:PORT is needed, as in 10.0.0.1:6379")
    with ExitStack() as resources:
        # Ray's threads print what happens to nodes on stdout, which is for results. Events say it on stderr.
        resources.enter_context(redirect_stdout(resources.enter_context(open(os.devnull, "w"))))
        _connect(address, modules, resources.enter_context(tempfile.TemporaryDirectory()))
        import ray

        resources.callback(ray.shutdown)
        needs = Needs(cpus, _gpus(gpus, device))
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if address == EMBEDDED and not needs.slots(nodes[0]):
            has = f"{nodes[0].get('CPU', 0):g} CPUs and {nodes[0].get('GPU', 0):g} GPUs"
            raise InputError(f"--cpus-per-trial {cpus}, --gpus-per-trial {needs.gpus:g}: this machine has {has}")
        loop = resources.enter_context(_event_loop())
        yield RayEngine(needs, address, loop, resources.close, nodes, modules)


@dataclass(frozen=True)
class Needs:
    """What a trial takes of a node."""

    cpus: int
    gpus: float

    def slots(self, resources: Mapping[str, float]) -> int:
        """How many trials a node with these resources trains at once."""
        pairs = [(resources.get("CPU", 0), self.cpus), (resources.get("GPU", 0), self.gpus)]
        return min(int(available / needed + 1e-6) for available, needed in pairs if needed)


class RayEngine:
    """Trains the trials of one study on a Ray cluster: a `scheduling.Cluster`."""

    def __init__(
        self,
        needs: Needs,
        address: str,
        loop: asyncio.AbstractEventLoop,
        end: Callable[[], None],
        nodes: Sequence[Mapping[str, float]],
        modules: Sequence[str],
    ) -> None:
        import ray

        self.needs, self.loop, self.end, self.modules = needs, loop, end, modules
        self.embedded = address == EMBEDDED
        self.device = "cuda" if needs.gpus else "cpu"
        self.threads = needs.cpus
        self.at_once = 1  # each task says what its node has room for
        self.slots = sum(map(needs.slots, nodes))
        self.in_words = _in_words(len(nodes), self.slots, address)
        self.task: Any = ray.remote(_train).options(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=0)
        self.shared: _Shared | None = None
        self.messages: queue.Queue[tuple[Trial, Message]] = queue.Queue()
        self.tasks: dict[str, _Task] = {}  # by the ids of their trials; changed by the loop alone
        self.watch = asyncio.run_coroutine_threadsafe(self._watch(), loop)

    def run(
        self,
        trials: Sequence[Trial],
        setup: Setup,
        directory: StudyDirectory,
        stopped: Flag,
        timeout_s: float | None = None,
    ) -> Iterator[Event]:
        """Trains trials and yields the engine's events, as `isolation.Pool.run` does."""
        if self.shared is None:
            weights = {file.stem: file.read_bytes() for file in directory.path.glob("weights/*.safetensors")}
            setup = replace(setup, begin=partial(_import_modules, self.modules), weights=weights)
            self.shared = _Shared.put(setup, timeout_s, self.needs, len(trials))
        return schedule(trials, directory, self, stopped)

    def room(self) -> int:
        return 2 * self.slots + WAITING

    def submit(self, trial: Trial, resume: Path) -> None:
        state = resume.read_bytes() if resume.exists() else None
        generator = self.task.remote(trial, state, self.shared)
        asyncio.run_coroutine_threadsafe(self._follow(trial, generator), self.loop)

    def next(self, timeout_s: float) -> tuple[Trial, Message] | None:
        try:
            return self.messages.get(timeout=timeout_s)
        except queue.Empty:
            if self.watch.done():
                self.watch.result()  # raises its error
            return None

    def stop(self) -> None:
        import ray

        assert self.shared is not None  # something was submitted
        self.shared.stop.say.remote()

        async def cancel_waiting() -> None:
            for task in self.tasks.values():
                if task.node is None:
                    ray.cancel(task.generator)

        asyncio.run_coroutine_threadsafe(cancel_waiting(), self.loop)

    async def _follow(self, trial: Trial, generator: "ObjectRefGenerator") -> None:
        """Takes in what a task sends until it ends."""
        import ray.exceptions as failures

        follower = asyncio.current_task()
        assert follower is not None
        task = self.tasks[trial.id] = _Task(generator, follower)
        message: Message | None = None
        try:
            async for reference in generator:
                sent = await reference
                if isinstance(sent, Report):
                    self.messages.put((trial, _of_this_code(sent)))
                else:
                    task.node = sent
        except failures.TaskCancelledError:
            pass
        except failures.RayTaskError as error:
            message = error.cause if isinstance(error.cause, Exception) else error
        except failures.OutOfMemoryError:
            message = crashed("Ray ended the training process, as its node ran out of memory")
        except (failures.NodeDiedError, failures.ObjectLostError, asyncio.CancelledError):  # the last by `_watch`
            message = NODE_LOST
        except failures.WorkerCrashedError:
            alive = task.node is not None and await self.loop.run_in_executor(None, _answers, task.node)
            message = crashed("the process of its task was killed") if alive else NODE_LOST
        except failures.RayError as error:
            message = ProcessLost(f"Ray cannot run a task: {reason_of(error)}")
        self.tasks.pop(trial.id, None)
        self.messages.put((trial, crashed("its task ended before it was done") if message is None else message))

    async def _watch(self) -> None:
        """Counts the slots, and gives up tasks on nodes that are lost: Ray says nothing of a task whose node's daemon
        was killed and whose own process goes on."""
        import ray

        while True:
            nodes = await self.loop.run_in_executor(None, ray.nodes)
            self.slots = sum(self.needs.slots(node["Resources"]) for node in nodes if node["Alive"])
            dead = {node["NodeID"] for node in nodes if not node["Alive"]}
            for task in self.tasks.values():
                if task.node in dead:
                    task.follower.cancel()
            await asyncio.sleep(LOOK_AT_NODES_S)


@dataclass(frozen=True)
class _Shared:
    """What all tasks get."""

    setup: "ObjectRef"  # with the data: put into the object store once, from where each node gets it once
    stop: "ActorHandle"
    timeout_s: float | None
    needs: Needs
    trials: int

    @classmethod
    def put(cls, setup: Setup, timeout_s: float | None, needs: Needs, trials: int) -> "_Shared":
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        local = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        stop: Any = ray.remote(_Stop).options(num_cpus=0, max_concurrency=10**6, scheduling_strategy=local)
        return cls(ray.put(setup), stop.remote(), timeout_s, needs, trials)


class _Stop:
    """An actor at which the nodes wait for the driver's word to stop."""

    def __init__(self) -> None:
        self.said = asyncio.Event()

    async def wait(self) -> None:
        await self.said.wait()

    async def say(self) -> None:
        self.said.set()


@dataclass
class _Task:
    generator: "ObjectRefGenerator"
    follower: asyncio.Task
    node: str | None = None  # its id; None while the task waits


def _answers(node_id: str) -> bool:
    """Whether a node's daemon accepts a connection."""
    import ray

    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S):
            return node["Alive"]
    except OSError:
        return False


_workplace: "_Workplace | None" = None  # of this process, which Ray uses for one task after another


def _train(trial: Trial, state: bytes | None, shared: _Shared) -> Iterator[str | Report]:
    """The task: its node's id, then what happens."""
    import ray

    global _workplace
    node = ray.get_runtime_context().get_node_id()
    yield node
    if _workplace is None:
        _workplace = _Workplace(node, shared)
    yield from _workplace.train(trial, state)


class _Workplace:
    """A process of a node: it has a pool of one process, and a study directory for one trial at a time."""

    def __init__(self, node_id: str, shared: _Shared) -> None:
        import ray

        self.pool = Pool(1)  # which begins to import PyTorch, while the data come
        self.directory = StudyDirectory(Path(tempfile.mkdtemp(prefix="expertgrid-")))
        (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
        at_once = max(1, min(shared.needs.slots(resources), shared.trials))
        self.setup = replace(ray.get(shared.setup), directory=self.directory.path, at_once=at_once)
        self.directory.write_weights(self.setup.weights)
        self.timeout_s, self.stopped = shared.timeout_s, Flag()
        Thread(target=self._wait, args=(shared.stop,), daemon=True).start()

    def _wait(self, stop: "ActorHandle") -> None:
        """Until the driver says stop, or is lost."""
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(stop.wait.remote())
        self.stopped.set()

    def train(self, trial: Trial, state: bytes | None) -> Iterator[Report]:
        if state is not None:
            write_whole(self.directory.resume_file(trial.id), state)
        try:
            for event in self.pool.run([trial], self.setup, self.directory, self.stopped, self.timeout_s):
                with suppress(FileNotFoundError):  # the state of a trial that was done meanwhile
                    yield _report(event, self.directory)
        except Stopped:  # its state is sent
            return
        except OSError as error:
            raise ProcessLost(f"on node {socket.gethostname()}: {error}") from error
        finally:
            shutil.rmtree(self.directory.trial(trial.id), ignore_errors=True)


def _report(event: Event, directory: StudyDirectory) -> Report:
    """An event with the files that it is about. Raises FileNotFoundError where a state is not there any more."""
    trial = event.trial.id
    names = {
        StateSaved: ("resume.pt",),
        TrialFailed: ("failure.json", TRACEBACK),
        TrialDone: ("epochs.jsonl", "model.safetensors"),
    }
    files = {name: (directory.trial(trial) / name).read_bytes() for name in names.get(type(event), ())}
    if isinstance(event, TrialDone) and (network := directory.trial(trial) / NETWORK).exists():
        files[NETWORK] = network.read_bytes()
    if not isinstance(event, TrialDone):
        return Report(event, files)
    reads = [read for read in directory.test_reads() if read.trial == trial]
    return Report(event, files, directory.predictions(trial), reads)


def _of_this_code(report: Report) -> Report:
    """A report whose record has the version and the commit of this code, which the driver has sent to the node."""
    if not isinstance(report.event, TrialDone):
        return report
    record = report.event.record
    versions = {name: number for name, number in record.environment.versions.items() if name != "expertgrid"}
    with suppress(PackageNotFoundError):  # it runs from a folder of source code
        versions = {"expertgrid": version("expertgrid")} | versions
    environment = record.environment.model_copy(update={"versions": versions, "commit": checkout_commit()})
    record = record.model_copy(update={"environment": environment})
    return replace(report, event=TrialDone(report.event.trial, record))


def _connect(address: str, modules: Sequence[str], empty: str) -> None:
    """Joins a cluster, or starts an embedded one, which nobody else can join.

    Its processes work in a copy of the folder `empty`, as Ray has them look for modules in the folder where they work.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported and when it starts a cluster
    # Of an embedded cluster: trials are no work for idle times, and a busy machine starts processes slowly.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    if address == EMBEDDED:
        if "ray" not in sys.modules:  # else, by a user's module: then a token is needed too, but it listens anywhere
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on all systems
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # no file has it
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray: Ray is not installed; `uv sync --extra ray` brings it") from None
    options: dict[str, Any] = {
        "runtime_env": {"py_modules": _sent(modules), "working_dir": empty, "excludes": NOT_SENT},
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address == EMBEDDED:
            options |= {"num_cpus": usable_cores(), "include_dashboard": False}
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"--address {address}: no cluster can be joined: {reason_of(error)}") from error
    finally:
        for signum, handler in handlers.items():  # Ray has put its own there
            signal.signal(signum, handler)


def _sent(modules: Sequence[str]) -> list[str]:
    """The files and folders that are sent to the nodes: this package, and modules that are files or lie beside them.

    Those are named by their files, or by their names where they lie in the working directory.
    """
    ours = [str(Path(__file__).parents[2])]
    files = [Path(name) if _is_file(name) else Path(f"{name.partition('.')[0]}.py") for name in modules]
    beside = [path if path.exists() else path.with_suffix("") for path in dict.fromkeys(files)]
    return ours + [str(path.absolute()) for path in beside if path.exists()]


def _is_file(module: str) -> bool:
    """Whether --import names a module by its file, as in path/my_net.py."""
    return Path(module).suffix == ".py"


def _import_modules(modules: Sequence[str]) -> None:
    """Imports the user's modules on a node, where they are installed with the task."""
    from expertgrid.model.registry import register_networks

    for module in modules:
        try:
            register_networks(import_module(Path(module).stem if _is_file(module) else module))
        except (Exception, SystemExit) as error:  # a user's module may fail in any way
            reason = reason_with_place(error)
            raise InputError(f"--import {module}: on node {socket.gethostname()}: {reason}") from error


def _gpus(share: float | None, device: str) -> float:
    """How much of a GPU a trial gets. Raises InputError where that does not fit the device."""
    import ray

    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: Ray chooses the GPU; --engine ray takes auto, cpu or cuda")
    if device == "cpu" and share:
        raise InputError(f"--gpus-per-trial {share:g}: does not go with --device cpu")
    if device == "cuda" and share == 0:
        raise InputError("--gpus-per-trial 0: does not go with --device cuda")
    if share is not None or device == "cpu":
        return share or 0.0
    return 1.0 if device == "cuda" or ray.cluster_resources().get("GPU", 0) else 0.0


def _in_words(nodes: int, slots: int, address: str) -> str:
    joined = f"at {address}, {nodes} {'node' if nodes == 1 else 'nodes'}"
    place = "embedded on this machine" if address == EMBEDDED else joined
    waits = "" if slots else "; trials wait for a node that has what they need"
    return f"Ray, {place}: room for {slots} {'trial' if slots == 1 else 'trials'} at once{waits}"


@contextmanager
def _event_loop() -> Generator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own. What it still does at the end is cancelled."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def cancel() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1.0) if tasks else None

    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(cancel(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

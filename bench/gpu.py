"""On a GPU: the speed, the study and the latency, measured; in pieces, each of minutes, that can be done apart.

    python -m bench.gpu --data SRC                        # all pieces, in the order of `PIECES`, eight minutes each
    python -m bench.gpu --data SRC --pieces fast          # some of them
    python -m bench.gpu --summary --write README.md       # the tables, between README's markers

A piece writes OUT/DEVICE-DATE/PIECE.json anew after each of its steps. One that is interrupted, or whose time is up,
keeps what was measured, and the same command goes on from there; done pieces are skipped, unless `--again`. What the
pieces work on, the study directories and exported files, is in OUT/DEVICE-DATE/work.

So a machine that is lent for minutes at a time, with a fresh checkout each time, needs two lines around each call. They
bring the results and the records along; weights and exported files stay, so `inference` belongs in the call of `fast`:

    tar xzf gpu.tgz || true
    python -m bench.gpu --out gpu --data SRC --pieces fast,inference
    tar czf gpu.tgz --exclude=model.safetensors --exclude=resume.pt --exclude=*.onnx gpu

SRC must be the same in each call, as a study is one with its data. What stops within a training begins that one again,
or goes on from its resume.pt where that travels too. `--smoke` does all pieces small, on a CPU too: to see that
everything runs, not for its numbers. Begin with it on a new machine: `--smoke --pieces train-speed,fast,inference`.
Of several GPUs the first is measured; CUDA_VISIBLE_DEVICES says which that is.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from pydantic import BaseModel, ValidationError

from bench import summary
from bench.latency import LatencyRecord
from bench.peaks import measure_peaks
from bench.resident import measure_resident
from model.errors import InputError, invalid, unknown
from model.fast.execution import Means
from model.files import now, write_whole
from model.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent
# Started in the background of a shell, a process would not notice an interrupt.
COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from {} import main; sys.exit(main())"
)
EXPERTGRID, STEP = "ablations", "bench.step"
PACKAGES = ("expertgrid", "torch", "torchvision", "timm", "triton", "onnxruntime", "onnxruntime-gpu")
GRACE_S = 20.0  # for a command to put down what it has, once it was interrupted
LEAST_MEMORY = 16 * 2**30  # of the GPU, free
INTERRUPTED = 130
KEPT_CALLS = 200  # of each engine and batch size; the percentiles are of all
STEP_PRESET = "eight_block"  # which the targets are for
WAYS = {  # to take a training step; the last can do the most harm
    "eager": Means(),
    "graphs": Means(graphs=True),
    "compiled": Means(compile=True, graphs=True),
    "kernels": Means(kernels=True, graphs=True),
}


class TimeIsUp(Exception):
    """The piece's minutes are over."""


class Measured(BaseModel):
    """A step of a piece: what was measured, when and where (of the piece's environments)."""

    complete: bool
    finished: str
    seconds: float
    environment: int
    value: Any


class Piece(BaseModel):
    """A piece's file."""

    piece: str
    smoke: bool
    data: str  # the source's name, as a table calls it
    command: str
    done: bool = False
    environments: list[dict[str, Any]] = []
    steps: dict[str, Measured] = {}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    presets: tuple[str, ...] = (STEP_PRESET, *(n for n in PRESETS if n != STEP_PRESET and "_matched_" not in n))
    training: tuple[str, ...] = ("--batch", "128", "--steps", "100", "--rounds", "5")
    stepped: tuple[str, ...] = (STEP_PRESET, "speed")  # whose step is looked into: norms in the experts, after the mix
    step: tuple[str, ...] = ("--batch", "128")  # and how, for `bench.step`
    rounds: int = 5  # of the peaks
    peak_s: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)  # of each study
    networks: tuple[str, ...] = ("speed", "accuracy")
    twins: tuple[str, ...] = ("_matched_params", "_matched_macs")
    seeds: int = 5
    card: str | dict = "card"
    card_seeds: tuple[int, ...] = (3, 5)
    card_factors: tuple[str, ...] = ("experts", "residual", "gate", "cutout")
    references: str | dict = "references"
    reference_seeds: tuple[int, ...] = (1, 3)
    spread: str | dict = "spread"
    spread_seeds: int = 3
    served: tuple[str, ...] = (STEP_PRESET, "speed", "accuracy")  # whose latency is measured
    precisions: tuple[str, ...] = ("fp32", "fp16")
    batches: tuple[int, ...] = (1, 8, 64, 512, 2048)
    largest_on_cpu: int = 512
    measure_s: float = 1.0


_SMALL = {"width": 0.0625, "recipe.epochs": 1, "recipe.batch_size": 16}
SMOKE = Size(
    presets=("two_block",), training=("--batch", "2", "--steps", "1", "--rounds", "1", "--compile", "off"),
    rounds=1, peak_s=0.01,
    stepped=(STEP_PRESET,), step=("--batch", "2", "--size", "8", "--width", "0.0625", "--steps", "1", "--rounds", "1"),
    settings=_SMALL, networks=("speed",), twins=(), seeds=2,
    card={"question": "One expert or two?", "base": {"model": "two_block"}, "factors": {"experts": [1, 2]}},
    card_seeds=(2,), card_factors=("experts",), reference_seeds=(1,), served=(STEP_PRESET,), precisions=("fp32",),
    batches=(1, 2),
    references={"question": "What do two references reach?", "factors": {"reference": ["two_block", "segmented"]},
                "reported": {"two_block": "80.68 (last epoch)", "segmented": "91.07"}},
    spread={"question": "What is an expert worth?", "base": {"model": "two_block"}, "design": "one_at_a_time",
            "factors": {"experts": [1]}}, spread_seeds=2,
    measure_s=0.01,
)  # fmt: skip


@dataclass
class Bench:
    """Where and how large the pieces are measured, and until when the present one may go on."""

    place: Path  # OUT/DEVICE-DATE
    device: torch.device
    data: str
    smoke: bool
    size: Size
    until: float = 0.0  # of time.monotonic

    @property
    def work(self) -> Path:
        return self.place / "work"

    def expertgrid(self, *arguments: object) -> str:
        """What a command of the command line prints. Raises as `command` does."""
        return self.command(EXPERTGRID, *arguments)

    def command(self, module: str, *arguments: object) -> str:
        """What the `main` of a module prints, in a process of its own: what breaks the device there ends with it.

        Where it is stopped, by the user or as the time is up, it is interrupted, and left a while to put down what it
        has. Raises TimeIsUp then, and InputError with its own complaint where it does not work.
        """
        line = [sys.executable, "-c", COMMAND.format(module), *map(str, arguments)]
        place = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True,
            env={**os.environ, "PYTHONPATH": place, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _interrupt(process)
            raise TimeIsUp from None
        except KeyboardInterrupt:
            _interrupt(process)
            raise
        if process.returncode in (0, 1) and out.strip():
            return out  # 1: some trial or certificate failed, which the files say
        said = [one for one in err.splitlines() if one.strip()] or [f"exit status {process.returncode}"]
        errors = [one.removeprefix("error: ") for one in said if one.startswith("error: ")]
        name = "expertgrid" if module == EXPERTGRID else module
        raise InputError(f"{name} {arguments[0]}: {(errors or said)[-1]}")


def _interrupt(process: subprocess.Popen) -> None:
    """Ends a command and the processes that it started."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


Step = Callable[[], tuple[Any, bool]]  # what was measured, and whether it is all


def whole(measure: Callable[[], Any]) -> Step:
    return lambda: (measure(), True)


def peaks(bench: Bench) -> dict[str, Step]:
    """What the device can do at most."""

    def rounds() -> list[dict[str, float]]:
        return [measure_peaks(bench.device, bench.size.peak_s).model_dump() for _ in range(bench.size.rounds)]

    return {"peaks": whole(rounds)}


def train_speed(bench: Bench) -> dict[str, Step]:
    """A step of two networks in each way that it can be taken: right, by kernel, over its floor; then all presets.

    The presets are trained beside the plain way to do it.
    """
    size, on = bench.size, ["--device", bench.device, "--format", "json"]

    def speed(preset: str) -> dict[str, Any]:
        return json.loads(bench.expertgrid("bench-train", preset, *size.training, *on))

    def step(preset: str, means: Means) -> dict[str, Any]:
        how = [f"--{name}" for name, used in asdict(means).items() if used]
        return json.loads(bench.command(STEP, preset, *how, *size.step, *on))

    ways = WAYS if bench.device.type == "cuda" else {"eager": Means()}
    steps = {
        f"step-{preset}-{name}": whole(partial(step, preset, means))
        for preset in size.stepped
        for name, means in ways.items()
    }
    return steps | {preset: whole(lambda preset=preset: speed(preset)) for preset in size.presets}


def fast(bench: Bench) -> dict[str, Step]:
    """Our own networks by their own recipes, exported; then beside plain networks of equal cost."""
    size, steps = bench.size, {}

    def study(name: str, models: Sequence[str]) -> dict[str, Any]:
        return {
            "question": "What do a few seconds of training reach, and do experts earn their cost in them?",
            "base": {"model": name, "recipe": name},
            "set": {"recipe.tta": "flip"},
            "factors": {"model": models},
        }

    for name in size.networks:
        steps[name] = lambda name=name: train(bench, name, study(name, [name]), size.seeds)
        steps |= exports(bench, name)
    for name in size.networks if size.twins else ():
        twins = study(name, [name + twin for twin in size.twins])
        steps[f"{name}-twins"] = lambda name=name, twins=twins: train(bench, f"{name}-twins", twins, size.seeds)
    return steps


def card(bench: Bench) -> dict[str, Step]:
    """The study that ships, with a few seeds, then with more."""
    size = bench.size
    by = {size.card_seeds[-1]: size.card_factors}  # what each factor is worth, once all are there
    return {
        f"{seeds}-seeds": lambda seeds=seeds: train(bench, "card", size.card, seeds, by.get(seeds, ()))
        for seeds in size.card_seeds
    }


def references(bench: Bench) -> dict[str, Step]:
    """The reports' networks at full length, each with its own recipe; and where their spread comes from."""
    size = bench.size
    steps = {
        f"{seeds}-seeds": lambda seeds=seeds: train(bench, "references", size.references, seeds)
        for seeds in size.reference_seeds
    }
    spread = partial(train, bench, "spread", size.spread, size.spread_seeds, peek=True)
    first, *others = steps
    return {first: steps[first], "spread": spread, **{name: steps[name] for name in others}}


def inference(bench: Bench) -> dict[str, Step]:
    """The latency of a network of the reports and of what `fast` exported, from the host's memory and the device's.

    The first is trained for one epoch only: its speed does not depend on its weights.
    """
    size, steps = bench.size, {}
    providers = [*["cuda"] * (bench.device.type == "cuda"), "cpu"]

    def from_host(file: Path, provider: str) -> dict[str, Any]:
        there(file)
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / "latency.json"
            largest = size.largest_on_cpu if provider == "cpu" else max(size.batches)
            batches = ",".join(str(batch) for batch in size.batches if batch <= largest)
            bench.expertgrid("bench", file, "--provider", provider, "--batch", batches, "--json", path)
            record = LatencyRecord.model_validate_json(path.read_bytes())
        return {**record.model_dump(), "latencies": [thinned(one.model_dump()) for one in record.latencies]}

    def on_device(file: Path) -> dict[str, Any]:
        there(file)
        latencies, missing = measure_resident(file, bench.device, list(size.batches), size.measure_s)
        return {
            "latencies": [thinned(one.model_dump()) for one in latencies],
            "missing": [one.model_dump() for one in missing],
        }

    def there(file: Path) -> None:
        if not file.exists():
            raise InputError(
                f"{file.name} is not in {file.parent}: it was rejected, or made elsewhere; --pieces fast,inference "
                "--again makes it here"
            )

    brief = {"question": "How fast does it answer?", "base": {"model": STEP_PRESET, "recipe": "fast"}}
    brief |= {"set": {"recipe.epochs": 1}, "factors": {"model": [STEP_PRESET]}}
    steps[STEP_PRESET] = lambda: train(bench, STEP_PRESET, brief, 1)
    steps |= exports(bench, STEP_PRESET)
    for name, provider, precision in itertools.product(size.served, providers, size.precisions):
        what, file = f"{name}-{precision}-{provider}", exported(bench, name, precision)
        if provider == bench.device.type:
            steps[f"{what}-device"] = whole(lambda file=file: on_device(file))
        steps[f"{what}-host"] = whole(lambda file=file, provider=provider: from_host(file, provider))
    return steps


PIECES: dict[str, Callable[[Bench], dict[str, Step]]] = {
    "peaks": peaks,
    "train-speed": train_speed,
    "fast": fast,
    "card": card,
    "inference": inference,
    "references": references,
}
WORK = {  # what each has in `work`
    "fast": ("speed", "speed-twins", "accuracy", "accuracy-twins"),
    "inference": (STEP_PRESET,),
    "card": ("card",),
    "references": ("references", "spread"),
}


def thinned(latency: dict[str, Any]) -> dict[str, Any]:
    """A latency with some of its calls, evenly spaced, where there are many."""
    calls_ms = latency["calls_ms"]
    return {**latency, "calls_ms": calls_ms[:: -(-len(calls_ms) // KEPT_CALLS)]}


def train(
    bench: Bench,
    name: str,
    study: str | dict,
    seeds: int,
    by: Sequence[str] = (),
    peek: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Trains a study, or goes on with it; what it has, raw, and whether all its trials ended."""
    directory = bench.work / name
    if isinstance(study, dict):
        file = bench.work / f"{name}.toml"
        write_whole(file, tomli_w.dumps(study).encode())
        study = str(file)
    if (directory / "study.toml").exists():  # which may have grown beyond this step
        seeds = max(seeds, tomllib.loads((directory / "study.toml").read_text())["seeds"])
    settings = [part for path, value in bench.size.settings.items() for part in ("--set", f"{path}={value}")]
    where = ["--out", directory, "--data", bench.data, "--device", bench.device, "--seeds", seeds]
    try:
        bench.expertgrid("run", study, *where, *settings)
    except TimeIsUp:
        if not (directory / "plan.json").exists():
            raise
        return trained(directory), False
    value = trained(directory)
    if by and not value["failures"]:
        value["effects"] = {
            factor: json.loads(bench.expertgrid("table", directory, "--by", factor, "--format", "json"))
            for factor in by
        }
    if peek:
        value["peek"] = json.loads(bench.expertgrid("table", directory, "--peek", "--format", "json"))
    if value["failures"] and not any(one["records"] for one in value["cells"]):
        raise InputError(f"every trial of {name} failed, the first by: {next(iter(value['failures'].values()))}")
    ended = all(len(one["records"]) + len(one["failed"]) == one["planned"] for one in value["cells"])
    return value, ended


def trained(directory: Path) -> dict[str, Any]:
    """The cells of a study directory with the records of their trials."""
    plan = json.loads((directory / "plan.json").read_text())
    study = tomllib.loads((directory / "study.toml").read_text())
    failures, cells = {}, []
    for cell in plan["cells"]:
        found = [(trial, directory / "trials" / trial) for trial in cell["trials"]]
        records = [
            json.loads((path / "record.json").read_text()) for _, path in found if (path / "record.json").exists()
        ]
        failed = {
            trial: json.loads((path / "failure.json").read_text())["error"]
            for trial, path in found
            if (path / "failure.json").exists() and not (path / "record.json").exists()
        }
        failures |= failed
        for record in records:
            record.pop("environment")
        row = {"model": cell["model_name"], "levels": cell["levels"], "planned": len(found), "failed": sorted(failed)}
        cells.append({**row, "records": records})
    return {"cells": cells, "failures": failures, "reported": study.get("reported", {})}


def exported(bench: Bench, name: str, precision: str) -> Path:
    return bench.work / "export" / f"{name}{'' if precision == 'fp32' else f'-{precision}'}.onnx"


def exports(bench: Bench, name: str) -> dict[str, Step]:
    return {
        f"export-{name}-{precision}": whole(lambda precision=precision: export(bench, name, precision))
        for precision in bench.size.precisions
    }


def export(bench: Bench, name: str, precision: str) -> dict[str, Any]:
    """Exports the best trial of a study, certified on CUDA too where ONNX Runtime has it; the certificate.

    A file that CUDA does not run, or that does not pass there, is certified on the CPU, and `not_on_cuda` says why.
    """
    import onnxruntime

    file = exported(bench, name, precision)
    file.parent.mkdir(parents=True, exist_ok=True)
    on_cuda = bench.device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()

    def certified_on(providers: str) -> dict[str, Any]:
        for kept in (file, file.with_suffix(".rejected.onnx")):
            kept.unlink(missing_ok=True)
        how = ["--precision", precision, "--out", file.parent / f"{name}.onnx", "--data", bench.data]
        bench.expertgrid("export", bench.work / name, *how, "--provider", providers)
        kept = file if file.exists() else file.with_suffix(".rejected.onnx")
        if not kept.exists():
            raise InputError(f"{name} was not exported in {precision}")
        certificate = json.loads(kept.with_suffix(".certificate.json").read_text())
        return {"file": kept.name, "bytes": kept.stat().st_size, "certificate": certificate}

    if not on_cuda:
        return certified_on("cpu") | {"not_on_cuda": "ONNX Runtime has no CUDA here"}
    try:
        found = certified_on("cpu,cuda")
    except InputError as error:
        return certified_on("cpu") | {"not_on_cuda": str(error)}
    if not found["certificate"]["passed"]:
        return certified_on("cpu") | {"not_on_cuda": "did not pass", "rejected": found["certificate"]}
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, driver and versions."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    found = {"threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions}
    if device.type != "cuda":
        return {"device": device_name(device), **found}
    properties = torch.cuda.get_device_properties(device)
    found |= {"memory_bytes": properties.total_memory, "driver": driver()}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": device_name(device), **found}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def driver() -> str | None:
    """The version of the GPU's driver, None where nothing tells it."""
    try:
        line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(line, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def check_device(device: torch.device, smoke: bool) -> None:
    """Raises InputError for a device on which the measurement would not be one."""
    if smoke:
        return
    if device.type != "cuda":
        raise InputError(f"--device {device}: a CUDA device is measured; --smoke runs all pieces small on a CPU")
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = device_name(device)
        raise InputError(
            f"{name} has no bfloat16, which the networks train in; a GPU of compute capability 8.0 is needed"
        )
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_MEMORY:
        sizes = [f"{size / 2**30:.1f}" for size in (free, total, LEAST_MEMORY)]
        raise InputError(
            f"{device_name(device)}: {sizes[0]} of {sizes[1]} GiB of memory are free; {sizes[2]} are needed, so end "
            "what else runs there"
        )


def place(out: Path, device: torch.device) -> Path:
    """The newest directory of this device's results, or one of today: its date is that of the beginning."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    older = sorted(out.glob(f"{slug}-????-??-??"))
    return older[-1] if older else out / f"{slug}-{datetime.now(UTC):%Y-%m-%d}"


def data_name(source: str) -> str:
    """A data source as a table calls it: a folder's is that of the folder."""
    _, _, directory = source.partition(":")
    return Path(directory).expanduser().resolve().name if directory else source


def random_images(directory: Path) -> str:
    """A data source of a few random images of 32x32 pixels, for a smoke run."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label in "ab":
            for i in range(count):
                file = directory / split / label / f"{i}.png"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file)
    return f"folder:{directory}"


def read_piece(file: Path) -> Piece | None:
    """A piece's file, None where there is none. Raises InputError for a damaged one."""
    try:
        return Piece.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise invalid(str(file), error, Piece.model_fields) from None


def measure(name: str, bench: Bench, minutes: float, command: str) -> bool:
    """Measures a piece, or goes on with it; whether it is done. Its file is written after each step."""
    file = bench.place / f"{name}.json"
    piece = read_piece(file)
    steps = PIECES[name](bench)
    if piece and (piece.data, piece.smoke) != (data_name(bench.data), bench.smoke):
        raise InputError(f"{file}: was measured on {piece.data}; give --data as then, --again, or another --out")
    if piece and piece.done:
        print(f"{name}: done before; --again measures it anew", file=sys.stderr)
        return True
    piece = piece or Piece(piece=name, smoke=bench.smoke, data=data_name(bench.data), command=command)
    here = environment(bench.device)
    if here not in piece.environments:
        piece.environments.append(here)
    bench.until = time.monotonic() + 60 * minutes - min(GRACE_S, 6 * minutes)
    failed = []
    for step, run in steps.items():
        if step in piece.steps and piece.steps[step].complete:
            continue
        started = time.monotonic()
        try:
            if started >= bench.until:
                raise TimeIsUp
            print(f"{name}: {step}", file=sys.stderr, flush=True)
            value, complete = run()
        except TimeIsUp:
            return _stopped(name, minutes)
        except Exception as error:  # whatever one step dies of, the others are worth having
            failed.append(step)
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            print(f"error: {name}: {step}: {reason}", file=sys.stderr)
            continue
        piece.steps[step] = Measured(
            complete=complete, finished=now(),
            seconds=round(time.monotonic() - started, 3), environment=piece.environments.index(here), value=value,
        )  # fmt: skip
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()  # the next command has its own process
        piece.done = all(one in piece.steps and piece.steps[one].complete for one in steps)
        write_whole(file, piece.model_dump_json(indent=1).encode())
        if not complete and time.monotonic() >= bench.until:
            return _stopped(name, minutes)
    print(f"{name}: {'done' if piece.done else f'not done: {failed}'}: {file}", file=sys.stderr)
    return piece.done


def _stopped(name: str, minutes: float) -> bool:
    print(f"{name}: stopped after {minutes:g} minutes; the same command goes on from there", file=sys.stderr)
    return False


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", default=",".join(PIECES), help="which, separated by commas")
    parser.add_argument("--data", help="data source, as expertgrid takes it; cifar10 where not given")
    parser.add_argument("--device", help="cuda; of a smoke run cpu too")
    parser.add_argument("--out", type=Path, help="where results and state are kept; bench/results where not given")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a piece may take in one call")
    parser.add_argument("--smoke", action="store_true", help="all pieces small, on a CPU too")
    parser.add_argument("--again", action="store_true", help="measure anew what is done")
    parser.add_argument("--summary", nargs="?", type=Path, const=Path(), metavar="DIR", help="print the tables")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the summary between this file's markers")
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace, command: str) -> int:
    out = asked.out or (Path("runs/gpu-smoke") if asked.smoke else RESULTS)
    if asked.summary is not None:
        found = summary.newest(out) if asked.summary == Path() else asked.summary
        return summary.show(found, asked.write, out, write_whole)
    if asked.write is not None:
        raise InputError("--write is of --summary")
    names = asked.pieces.split(",")
    for name in names:
        if name not in PIECES:
            raise unknown("piece", name, PIECES)
    if not 0 < asked.minutes <= 60:
        raise InputError(f"--minutes {asked.minutes:g}: more than 0 and at most 60 are needed")
    if asked.device is None and not torch.cuda.is_available() and not asked.smoke:
        raise InputError("there is no CUDA device here; --smoke runs all pieces small on the CPU")
    there = ["cpu", *["cuda"] * torch.cuda.is_available()]
    name = asked.device or there[-1]
    if name not in there:
        raise unknown("device", name, there)
    device = torch.device(name)
    check_device(device, asked.smoke)
    where = place(out, device)
    data = asked.data or (random_images(out / "images") if asked.smoke else "cifar10")
    bench = Bench(where, device, data, asked.smoke, SMOKE if asked.smoke else Size())
    if asked.again:
        for one in names:
            (where / f"{one}.json").unlink(missing_ok=True)
            for study in WORK.get(one, ()):
                shutil.rmtree(bench.work / study, ignore_errors=True)
    done = [measure(name, bench, asked.minutes, command) for name in PIECES if name in names]
    return 0 if all(done) else 1


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some piece is not, 2 the input is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = options(arguments)
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _end)
    try:
        command = " ".join(["python -m bench.gpu", *arguments])
        return run(asked, re.sub(r"(?<=[ :=])/\S*/", "", command))  # without this machine's directories
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

"""What works on this device, found in a minute before anything long starts; and which choice is the faster one.

Kernels are compared with the plain modules, both with the gradients in float64; CUDA graphs and the step of
`eight_block` by the losses of the same steps. What fails is left out of all that follows, and the results say so.
"""

import copy
import importlib
import math
import os
import re
import statistics
import tomllib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from bench.gpu.pieces import Piece
from bench.gpu.plan import Bench, Measurement, Step
from bench.step import agreement, prepared
from bench.training import bare_round, in_turns
from model.config import Block, Conv, GateConfig, ModelConfig
from model.errors import InputError
from model.fast import execution
from model.fast.execution import LABELS, ExecutionPlan
from model.fast.settings import full_fp32, set_for_training
from model.net import ExpertNet
from model.presets import PRESETS
from model.registry import build
from model.variants import vary

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
NOT_NEEDED = ("grandalf", "onnxscript", "onnxruntime", "onnxruntime-gpu")  # by the trainings

# An error may be twice that of the plain modules in the same precision, and this share of the values more.
PRECISIONS = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 1e-2}
PARTS = {
    "three experts": Block(channels=64),
    "norm after the mix": Block(channels=64, kernels=(5, 5, 3), norm_act="mix"),
    "mlp gate, stride": Block(channels=64, stride=2, gate=GateConfig(kind="mlp", reduction=4)),
    "conv": Conv(channels=64),
}


@dataclass(frozen=True)
class Way:
    """A way to take a training step."""

    kernels: bool = True
    graphs: bool = True
    channels_last: bool = True
    fused: bool = True  # the optimiser
    settings: Mapping[str, Any] = field(default_factory=dict)  # of modules, such as model.fast.kernels.TILE


@dataclass(frozen=True)
class Choice:
    """Ways that differ in one thing, which are timed in turns, and the features that they are about."""

    ways: Mapping[str, Way]
    needs: tuple[str, ...] = ()


CHOICES = {
    "kernels": Choice({"on": Way(), "off": Way(kernels=False)}, ("kernels",)),
    "graphs": Choice({"on": Way(), "off": Way(graphs=False)}, ("graphs",)),
    "channels-last": Choice({"on": Way(), "off": Way(channels_last=False)}),
    "fused-optimiser": Choice({"on": Way(), "off": Way(fused=False)}),
    "tile": Choice({str(tile): Way(settings={"model.fast.kernels.TILE": tile}) for tile in (4096, 2048)}, ("kernels",)),
}


def steps(bench: Bench) -> list[Step]:
    """The steps of the check, in their order."""
    found = [Step("check", "versions", 10, versions, expected_s=1)]
    for precision in PRECISIONS:
        compare = partial(kernels_agree, precision=precision)
        found.append(Step("check", f"kernels-{precision}", 60, compare, ("kernels",), expected_s=5))
    found.append(Step("check", "graphs", 20, graphs_agree, ("graphs",), expected_s=3))
    found.append(Step("check", f"step-{bench.size.check['preset']}", 30, step_agrees, ("kernels",), expected_s=5))
    return found + [
        Step("check", f"choice-{name}", 20, partial(timed, choice=choice), choice.needs, expected_s=3)
        for name, choice in CHOICES.items()
    ]


def left_out(piece: Piece | None, device: torch.device) -> dict[str, str]:
    """The features that do not work here, each with its reason: it cannot, or a step of the check that is its failed.

    Kernels run on a CPU in Triton's interpreter, where that is chosen.
    """
    interpreted = {"kernels"} if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else set()
    found = {
        name: reason
        for name in ("kernels", "graphs")
        if name not in interpreted and (reason := execution.why_unavailable(name, device))
    }
    for step, reason in (piece.failed if piece else {}).items():
        feature = "graphs" if step == "graphs" else "kernels"
        if not step.startswith("choice-") and step != "versions":
            found.setdefault(feature, f"{step}: {reason}")
    return found


def report(piece: Piece, without: Mapping[str, str]) -> list[str]:
    """What works, what is left out and why, and which choice is the faster one, in lines."""
    lines = [f"{LABELS[name]}: left out: {reason}" for name, reason in without.items()]
    lines += [f"{LABELS[name]}: right" for name in ("kernels", "graphs") if name not in without]
    for step, measured in piece.steps.items():
        value = measured.value
        if value.get("lacking"):
            lines.append(f"lacking: {', '.join(value['lacking'])}")
        if step.startswith("choice-") and "ms" in value:
            ways = ", ".join(f"{name} {ms:.3f} ms" for name, ms in value["ms"].items())
            lines.append(f"{step.removeprefix('choice-')}: {ways}")
    lines += [f"{step}: failed: {reason}" for step, reason in piece.failed.items()]
    return [f"check: {line}" for line in lines]


def versions(bench: Bench) -> Measurement:
    """Which of the packages that `pyproject.toml` asks for are not here, or older. Without those of the export."""
    lacking = []
    for line in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
        asked = Requirement(line)
        if asked.name in NOT_NEEDED or (asked.marker and not asked.marker.evaluate()):
            continue
        try:
            found = version(asked.name)
        except PackageNotFoundError:
            lacking.append(f"{asked.name}, which is not installed")
            continue
        if not asked.specifier.contains(re.sub(r"\+.*", "", found), prereleases=True):
            lacking.append(f"{asked.name}{asked.specifier}, found {found}")
    return Measurement({"lacking": lacking})


def kernels_agree(bench: Bench, precision: str) -> Measurement:
    """The largest error of each part with its kernels and without, as shares of the values. Raises InputError."""
    from model.fast.kernels import fuse  # Triton is not everywhere

    found, wrong = {}, []
    set_for_training()
    side, batch, width = (bench.size.check[name] for name in ("size", "batch", "width"))
    for name, part in PARTS.items():
        torch.manual_seed(0)
        layer = part.model_copy(update={"channels": max(4, round(part.channels * width))})
        net = ExpertNet(ModelConfig(in_chans=8, layers=(layer,))).layers.to(bench.device)
        x_BCHW = torch.randn(min(batch, 16), 8, side, side, device=bench.device)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        fused = copy.deepcopy(net)
        fuse(fused)
        with nullcontext() if precision == "tf32" else full_fp32():
            kernels, plain = (_trained(one, x_BCHW, precision == "bf16") for one in (fused, copy.deepcopy(net)))
        exact = _trained(net.double(), x_BCHW.double(), False)
        errors = {what: tuple(_share(one[what], exact[what]) for one in (kernels, plain)) for what in exact}
        worst, (ours, others) = max(errors.items(), key=lambda item: _excess(*item[1]))
        found[name] = {"of": worst, "kernels": ours, "plain": others}
        if _excess(ours, others) > PRECISIONS[precision]:
            wrong.append(f"{name}: {worst} is {ours:.1e} off, the plain modules' {others:.1e}")
    if wrong:
        raise InputError(f"in {precision} kernels differ: {'; '.join(wrong)}")
    return Measurement({"tolerance": PRECISIONS[precision], "parts": found})


def _excess(error: float, plain: float) -> float:
    """By how much an error is more than twice that of the plain modules; infinite where one is NaN."""
    excess = error - 2 * plain
    return math.inf if math.isnan(excess) else excess


def _share(found: Tensor, exact: Tensor) -> float:
    """A difference as a share of the values, in their norms."""
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-6)).item()


def _trained(net: nn.Module, x_BCHW: Tensor, bfloat16: bool) -> dict[str, Tensor]:
    """The output of a training pass, and the gradients of the input and of all weights."""
    x_BCHW = x_BCHW.detach().clone().requires_grad_()
    with torch.autocast(x_BCHW.device.type, torch.bfloat16, enabled=bfloat16):
        output_BCHW = net.train()(x_BCHW)
    weights_BCHW = torch.linspace(-1, 1, output_BCHW.numel(), dtype=x_BCHW.dtype, device=x_BCHW.device)
    (output_BCHW * weights_BCHW.view(output_BCHW.shape)).sum().backward()
    assert x_BCHW.grad is not None
    gradients = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    return {"output": output_BCHW.detach(), "the input's gradient": x_BCHW.grad, **gradients}


def _agree(bench: Bench, preset: str, means: ExecutionPlan) -> Measurement:
    check = bench.size.check
    try:
        config = vary(PRESETS[preset], "width", check["width"])
        found = agreement(config, check["batch"], check["size"], bench.device, means, steps=6)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{preset}, {means}: {str(error).splitlines()[0]}") from error
    return Measurement(found.model_dump(mode="json"))


def graphs_agree(bench: Bench) -> Measurement:
    """The losses of steps that are replayed, beside those of plain steps. Raises InputError where they differ."""
    return _agree(bench, "two_block", ExecutionPlan(graphs=True))


def step_agrees(bench: Bench) -> Measurement:
    """The losses of the steps of `eight_block` with its kernels, beside plain ones. Raises InputError."""
    return _agree(bench, bench.size.check["preset"], ExecutionPlan(kernels=True, graphs="graphs" not in bench.without))


def timed(bench: Bench, choice: Choice) -> Measurement:
    """Milliseconds of a step of `eight_block` in each way of a choice, in turns, without what is left out."""
    check = bench.size.check
    rounds = {
        name: _rounds(bench, replace(way, **dict.fromkeys(bench.without, False))) for name, way in choice.ways.items()
    }
    in_turns(rounds, 1)
    seconds = in_turns(rounds, check["rounds"])
    milliseconds = {name: 1000 * statistics.median(times) / check["steps"] for name, times in seconds.items()}
    return Measurement({"ms": milliseconds, "batch": check["batch"]})


def _rounds(bench: Bench, way: Way) -> Callable[[], float]:
    """What takes a round of steps in one way, and returns its seconds."""
    check, device = bench.size.check, bench.device
    torch.manual_seed(0)
    config = vary(PRESETS[check["preset"]], "width", check["width"])
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    net = build(config).to(device).to(memory_format=layout).train()
    x_BCHW = torch.randn(check["batch"], 3, check["size"], check["size"], device=device)
    x_BCHW = x_BCHW.contiguous(memory_format=layout)
    y_B = torch.arange(check["batch"], device=device) % 10
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=way.fused or None, capturable=device.type == "cuda")
    with settings(way.settings):
        step = prepared(net, optimizer, x_BCHW, ExecutionPlan(way.kernels, graphs=way.graphs), bfloat16=True)

    def a_round() -> float:
        with settings(way.settings):
            return bare_round(lambda: step(x_BCHW, y_B, y_B), check["steps"], device)

    return a_round


@contextmanager
def settings(chosen: Mapping[str, Any]) -> Generator[None]:
    """Within, these constants of modules have these values."""
    places = {path: importlib.import_module(path.rpartition(".")[0]) for path in chosen}
    before = {path: getattr(module, path.rpartition(".")[2]) for path, module in places.items()}
    try:
        for path, value in chosen.items():
            setattr(places[path], path.rpartition(".")[2], value)
        yield
    finally:
        for path, value in before.items():
            setattr(places[path], path.rpartition(".")[2], value)

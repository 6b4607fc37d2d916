"""Which file serves a network fastest here, and how it is to be run.

Rewrites, precisions and engines are timed in turns; then the fastest of them with each option of its engine. The
fastest file that is certified is taken.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from expertgrid.bench.timing import Timer, Times, percentiles, take_turns
from expertgrid.export.certificate import Tried
from expertgrid.export.certify import REWRITE_SETS, CertifiedModel, Reference, UncertifiedModel, certified, rewritten
from expertgrid.export.metadata import AS_IT_IS, Options, Precision
from expertgrid.export.openvino import check_openvino
from expertgrid.export.precision import PrecisionError
from expertgrid.export.session import open_any, run
from expertgrid.export.to_onnx import INPUT, LOGITS
from expertgrid.model.system.errors import InputError

EFFORT, BRIEF = (0.4, 3), (0.05, 2)  # seconds of each way, and how often it is opened
FINALISTS = 3  # ways that are timed again, with options
ENGINES: dict[str, tuple[tuple[str, Precision], ...]] = {  # by the provider that is asked for
    "cpu": (("cpu", "fp32"), ("cpu", "int8"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8")),
    "cuda": (("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16")),
}


@dataclass(frozen=True)
class Way:
    """A way to serve a network."""

    rewrites: str
    precision: Precision
    provider: str
    options: Options = AS_IT_IS


def tune(
    reference: Reference,
    provider: str = "cpu",
    batch: int = 1,
    outputs: Collection[str] = (LOGITS,),
    before_each_certificate: Callable[[], object] = lambda: None,
    brief: bool = False,
) -> CertifiedModel:
    """The file that is fastest at this batch size among those that hold their bounds; its certificate has all that was
    tried.

    With `brief` ways are timed for a shorter time, and no options of their engines are tried. An engine that is not
    installed is named in the certificate. Raises InputError where no file is certified.
    """
    if provider not in ENGINES:
        raise InputError(f"--tune: chooses among the engines of --provider cpu or cuda, found {provider!r}")
    models, left_out = _models(reference, provider, outputs)
    images = reference.as_input(_some(reference.images.validation, batch))
    effort = BRIEF if brief else EFFORT
    times = _by_speed(models, images, effort, left_out)
    if not times:
        raise InputError(f"--tune: no engine runs the network here: {next(iter(left_out.values()))}")
    if not brief:
        finalists = {
            replace(way, options=options): models[way]
            for way in list(times)[:FINALISTS]
            for options in variants(way.provider)
        }
        again = _by_speed(finalists, images, effort, left_out)
        times = again | {way: taken for way, taken in times.items() if way not in finalists}
        models |= finalists
    ranked = list(times)
    for place, way in enumerate(ranked):
        tried = [
            _tried(other, batch, times.get(other), left_out.get(other, ""))
            for other in dict.fromkeys([*ranked, *left_out])
        ]
        tried[place] = tried[place].model_copy(update={"outcome": "chosen"})
        before_each_certificate()
        model = certified(models[way], reference, way.precision, [way.provider], way.provider, tried, way.options)
        if model.certificate.passed:
            return model
        left_out[way] = f"not certified: {model.certificate}"
    raise InputError(f"--tune: no file is certified; the fastest: {left_out[ranked[0]]}")


def _models(
    reference: Reference, provider: str, outputs: Collection[str]
) -> tuple[dict[Way, UncertifiedModel], dict[Way, str]]:
    """The different models of all ways, and the ways that are not possible here, with the reason."""
    models: dict[Way, UncertifiedModel] = {}
    left_out: dict[Way, str] = {}
    once = cache(lambda name, precision: rewritten(reference, precision, REWRITE_SETS[name], outputs))
    for engine, precision in ENGINES[provider]:
        try:
            if engine == "openvino":
                check_openvino()
            seen: set[bytes] = set()
            for name in ("folded",) if precision == "int8" else REWRITE_SETS:
                made = once(name, "fp32" if precision == "bf16" else precision)
                if made.model not in seen:  # for many networks a rewrite changes nothing
                    models[Way(name, precision, engine)] = made
                    seen.add(made.model)
        except (InputError, PrecisionError) as error:
            left_out[Way("folded", precision, engine)] = str(error)
    return models, left_out


def _some(images: np.ndarray, batch: int) -> np.ndarray:
    return images[np.arange(batch) % len(images)]


def variants(provider: str) -> list[Options]:
    """The options of an engine that are worth a try, its own way first."""
    if provider == "cuda":
        return [AS_IT_IS, Options(layout="NHWC")]
    if provider == "tensorrt":
        return [AS_IT_IS]
    all_threads = torch.get_num_threads()
    fewer = [Options(threads=count) for count in sorted({1, max(1, all_threads // 2)} - {all_threads})]
    if provider == "openvino":
        return [AS_IT_IS, *fewer]
    blocked = [AS_IT_IS, Options(spinning=False), *fewer] if fewer else [AS_IT_IS]
    return [option.model_copy(update={"layout": layout}) for option in blocked for layout in (None, "NCHW")]


def _by_speed(
    models: dict[Way, UncertifiedModel], images: np.ndarray, effort: tuple[float, int], left_out: dict[Way, str]
) -> dict[Way, Times]:
    """The times of the ways that run here, the fastest first; the others enter `left_out`.

    `effort` is the seconds of each, and how often each is opened.
    """
    candidates: dict[Way, Callable[[], Timer]] = {}
    for way, made in models.items():
        try:
            _open(made.model, way, images)
        except InputError as error:
            left_out[way] = str(error)
        else:
            candidates[way] = partial(_open, made.model, way, images)
    times = take_turns(candidates, *effort) if candidates else {}
    return dict(sorted(times.items(), key=lambda timed: np.median(timed[1].calls_ms)))


def _open(model: bytes, way: Way, images: np.ndarray) -> Timer:
    name = f"{way.rewrites} {way.precision}"
    session = open_any(model, way.provider, name, way.precision, options=way.options)
    call = partial(run, session, [LOGITS], {INPUT: images})
    call()
    return Timer(call)


def _tried(way: Way, batch: int, times: Times | None, reason: str) -> Tried:
    interval = percentiles(times, [50])[0] if times else None
    return Tried(
        rewrites=way.rewrites,
        precision=way.precision,
        provider=way.provider,
        options=str(way.options),
        batch=batch,
        outcome=reason or "slower",
        p50_ms=float(np.median(times.calls_ms)) if times else None,
        interval_ms=(interval.low, interval.high) if interval else None,
    )


def rows(tried: Sequence[Tried]) -> list[dict[str, object]]:
    """What was tried, as the rows of a table. Speeds are against the graph as it was trained, in ONNX Runtime."""
    trained = ("none", "fp32", "")
    plain_ms = next(
        (way.p50_ms for way in tried
         if (way.rewrites, way.precision, way.options) == trained and way.provider != "openvino"), None
    )  # fmt: skip
    return [
        {"engine": way.provider, "precision": way.precision, "rewrites": way.rewrites, "options": way.options,
         "p50 ms": way.p50_ms, "x as trained": plain_ms / way.p50_ms if plain_ms and way.p50_ms else None,
         "outcome": way.outcome}
        for way in tried
    ]  # fmt: skip

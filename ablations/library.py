"""`expertgrid.run` and `expertgrid.judge`: from a notebook or a script, the very way of the commands."""

import sys
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from expertgrid.ablations.cli import options, plan, sources
from expertgrid.ablations.cli.terminal import starting
from expertgrid.ablations.results.arrow import OpenedStudy, ShownScores
from expertgrid.ablations.results.scores import SCORE, SEED, judge_scores
from expertgrid.ablations.study.changes import CHOICES
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import load_study, parse_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.parts import PARTS
from expertgrid.model.variants import VARIANTS

File = str | PathLike[str]
open = OpenedStudy
_SOURCES: dict[str, bytes] = {}  # what the user's modules held at the first run in this process


def run(
    study: File | Mapping[str, Any],
    *,
    imports: Sequence[str] = (),
    data: str | None = None,
    data_dir: File | None = None,
    out: File | None = None,
    device: str = "auto",
    seeds: int | None = None,
    jobs: int | None = None,
) -> OpenedStudy:
    """Trains a study, as `expertgrid run` does with the options of these names, and opens its directory.

    `study` is a TOML file, a study that ships, or a dict that is like such a file, which needs `out`. `imports` are
    modules or files that register networks. The same call continues a study that was stopped, and tries failed trials
    again: `trials()` has their status. Raises InputError, before anything is trained, for wrong input.
    """
    options.module_names(imports)
    options.device_word(device)
    if isinstance(study, Mapping) and out is None:
        raise InputError("out: a study that is a dict needs a directory, as in out='runs/my'")
    sources.import_modules(imports)  # first: it registers variants, which the study may name
    _check_unchanged()
    file = f"{Path(out or '').name}.toml"
    named = parse_study(tomli_w.dumps(study), Path(file)) if isinstance(study, Mapping) else load_study(fspath(study))
    request = plan.read_request(named, seeds, None, data, {}, Path(out) if out else None, None, None)
    from expertgrid.ablations.engines.isolation import isolated, jobs_for

    with isolated(jobs or jobs_for(device), device) as trainer:
        with starting():
            from expertgrid.ablations.cli.run import How, say_failures, train_study
            from expertgrid.model.fast.execution import ExecutionOptions
        modules = [*imports, *_registering(request.study)]
        how = How(device, ExecutionOptions(), True, False, None, modules, False, trainer, [])
        say_failures(request.directory, train_study(request, Path(data_dir) if data_dir else None, how))
    return OpenedStudy(request.directory.path)


def judge(
    scores: Any, *, margin: float, factors: Any = None, seed: Any = None, lower_is_better: bool = False
) -> ShownScores:
    """The verdicts on scores that were made elsewhere, as `expertgrid judge` gives them.

    `scores` is a table of pyarrow, pandas or polars, or a dict, with the columns `seed`, `score` and those of the
    factors; or the scores alone, with `factors` (columns by name) and `seed`. Raises InputError as `judge_scores`.
    """
    if factors is not None and seed is not None:
        scores = {**factors, SEED: seed, SCORE: scores}
    elif not hasattr(scores, "columns") and not isinstance(scores, Mapping):
        raise InputError("a table with the columns of factors, seed and score is needed, or factors= and seed= as well")
    names = getattr(scores, "column_names", getattr(scores, "columns", scores))
    columns = {str(name): np.asarray(scores[name], dtype=object).tolist() for name in names}
    return ShownScores(**vars(judge_scores(columns, margin, lower_is_better)))


def _check_unchanged() -> None:
    """Raises InputError for a module whose file was changed: this process has older code than those that train."""
    for name, module in list(sys.modules.items()):
        file, package = Path(getattr(module, "__file__", None) or ""), name.partition(".")[0]
        not_users = package in (*sys.stdlib_module_names, "__main__", "expertgrid") or "-packages" in str(file)
        if not_users or not file.is_absolute() or not file.is_file():  # some modules of torch have no real file
            continue
        content = file.read_bytes()
        if _SOURCES.setdefault(name, content) != content:
            raise InputError(f"{file} was changed after it was imported; restart Python, or the notebook's kernel")


def _registering(study: Study) -> list[str]:
    """The user's modules that registered what the study names, for the processes that train.

    Raises InputError for what a script or a notebook registered itself, which they cannot see.
    """
    import timm

    levels = [level for factor in CHOICES for level in study.factors.get(factor, ())]
    names = [name for name in (study.base.model, *study.baselines, *levels) if isinstance(name, str)]
    functions = {name: timm.model_entrypoint(name) for name in names if timm.is_model(name)}
    functions |= {name: VARIANTS[name] for name in (*study.set, *study.factors) if name in VARIANTS}
    functions |= {name: part for parts in PARTS.values() for name, part in parts.items()}
    homes = {function.__module__: name for name, function in functions.items()}
    if "__main__" in homes:
        raise InputError(
            f"{homes['__main__']} is registered in this script or notebook, where the processes that train cannot see "
            "it; put it into a file, and give that, as in imports=['my_net.py']"
        )
    return [home for home in homes if home.split(".")[0] not in ("timm", "expertgrid")]

"""`expertgrid.run`: training from a notebook or a script, the very way of the command."""

import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import tomli_w

from expertgrid.ablations.cli import interrupt, options, plan, sources
from expertgrid.ablations.cli.terminal import starting
from expertgrid.ablations.results.arrow import OpenedStudy
from expertgrid.ablations.study.changes import CHOICES
from expertgrid.ablations.study.study import Study
from expertgrid.ablations.study.study_file import load_study, parse_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.training.parts import PARTS

File = str | PathLike[str]
open = OpenedStudy


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
    isolate: bool = True,
) -> OpenedStudy:
    """Trains a study, as `expertgrid run` does with the options of these names, and opens its directory.

    `study` is a TOML file, a study that ships, or a dict that is like such a file, which needs `out`. `imports` are
    modules or files that register networks. The same call continues a study that was stopped, and tries failed trials
    again: `trials()` has their status. Raises InputError, before anything is trained, for wrong input.
    """
    modules = options.module_names(imports) or ()
    options.device_word(device)
    named = _of_dict(study, out) if isinstance(study, Mapping) else load_study(fspath(study))
    request = plan.read_request(named, seeds, None, data, {}, Path(out) if out else None, None, None)
    with _user_interrupts():
        from expertgrid.ablations.engines.isolation import isolated, jobs_for

        with isolated(jobs or jobs_for(device), device) if isolate else nullcontext() as trainer:
            with starting():
                from expertgrid.ablations.cli.run import How, say_failures, train_study
                from expertgrid.model.fast.execution import ExecutionOptions
            sources.import_modules(modules)
            modules = [*modules, *_registering(request.study, isolate)]
            how = How(device, ExecutionOptions(), True, False, None, modules, False, trainer, [])
            say_failures(request.directory, train_study(request, Path(data_dir) if data_dir else None, how))
    return OpenedStudy(request.directory.path)


def _of_dict(fields: Mapping[str, Any], out: File | None) -> Study:
    """The study of a dict, called as its directory is. Raises InputError."""
    if out is None:
        raise InputError("out: a study that is a dict needs a directory, as in out='runs/my'")
    try:
        text = tomli_w.dumps(fields)
    except (TypeError, ValueError, RecursionError) as error:  # of a value that TOML does not have
        raise InputError(f"study: {error}") from None
    return parse_study(text, Path(f"{Path(out).name}.toml"))


def _registering(study: Study, isolate: bool) -> list[str]:
    """The user's modules that have registered the study's networks, or parts, for the processes that train.

    Raises InputError for what is of a script or a notebook, which they cannot see.
    """
    import timm

    levels = [level for factor in CHOICES for level in study.factors.get(factor, ())]
    names = [name for name in (study.base.model, *study.baselines, *levels) if isinstance(name, str)]
    homes = {timm.model_entrypoint(name).__module__: f"model {name!r}" for name in names if timm.is_model(name)}
    homes |= {part.__module__: f"part {name!r}" for parts in PARTS.values() for name, part in parts.items()}
    if isolate and "__main__" in homes:
        raise InputError(
            f"{homes['__main__']} is registered in this script or notebook, where the processes that train "
            "cannot see it; put it into a file, and give that, as in imports=['my_net.py']"
        )
    return [home for home in homes if home.split(".")[0] not in ("timm", "expertgrid", "__main__")]


@contextmanager
def _user_interrupts() -> Generator[None]:
    """Within, the first Ctrl-C stops the training at its next step. Afterwards signals do what they did before."""
    interrupt.stopped.clear()
    is_main = threading.current_thread() is threading.main_thread()  # no other can say what signals do
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    if is_main:
        interrupt.watch()
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

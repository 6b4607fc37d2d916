"""On a GPU: the speed, the study and the latency, measured; in pieces, each of minutes, that can be done apart.

    python -m bench.gpu --data SRC                        # all pieces, in their order, eight minutes each
    python -m bench.gpu --data SRC --pieces fast          # some of them
    python -m bench.gpu --summary --write README.md       # the tables, between README's markers

A piece writes OUT/DEVICE-DATE/PIECE.json anew after each of its steps. A piece that is interrupted, or whose time is
up, keeps what was measured, and the same command goes on from there; done pieces are skipped, unless `--again`. Study
directories and exported files are in OUT/DEVICE-DATE/work. On CUDA each step has a process of its own, so that a step
that breaks the device or hangs leaves the others.

A machine that is lent for minutes at a time, with a fresh checkout each time, needs two lines around each call. They
bring the results and the records along; weights and exported files stay, so `inference` belongs in the call of `fast`:

    tar xzf gpu.tgz || true
    python -m bench.gpu --out gpu --data SRC --pieces fast,inference
    tar czf gpu.tgz --exclude=model.safetensors --exclude=resume.pt --exclude=*.onnx gpu

SRC must be the same in each call, as a study is one with its data. A training that is interrupted begins again, or goes
on from its resume.pt where that travels too. `--smoke` does all pieces small, on a CPU too: it shows that everything
runs, and its numbers say nothing. Begin with it on a new machine: `--smoke --pieces train-speed,fast,inference`.
Of several GPUs the first is measured; CUDA_VISIBLE_DEVICES says which that is.
"""

import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from bench import command
from bench.gpu import runner, tables
from bench.gpu.stages import PIECES
from model.errors import InputError

SMOKE_OUT = Path("runs/gpu-smoke")


def gpu(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(help="Results for --summary; the newest if not given.")] = None,
    pieces: Annotated[str | None, typer.Option(help=f"Some of: {','.join(PIECES)}.")] = None,
    data: Annotated[str | None, typer.Option(help="Data source; cifar10 if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda; of a smoke run cpu too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; bench/results if not given.")] = None,
    minutes: Annotated[float, typer.Option(help="That a piece may take in one call.")] = 8.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="All pieces small, on a CPU too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is done.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Print the tables, measure nothing.")] = False,
    write: Annotated[Path | None, typer.Option(help="File whose markers get the summary.")] = None,
) -> int:
    """Measure a GPU: training speed, studies, latency."""
    out = out or (SMOKE_OUT if smoke else runner.RESULTS)
    if summary:
        return tables.show(directory or tables.newest(out), write, out)
    if write is not None or directory is not None:
        raise InputError(f"{'--write' if write else directory}: only --summary takes it")
    line = " ".join(["python -m bench.gpu", *context.obj])
    without_paths = re.sub(r"(?<=[ :=])/\S*/", "", line)  # of this machine
    return runner.run(runner.Asked(pieces, data, device, out, minutes, smoke, again, without_paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 some piece is not, 2 the input is wrong, 130 stopped by the user."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _stop)
    try:
        return command.run(gpu, arguments)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return command.INTERRUPTED


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""On a GPU: what works there, then the speed, the studies and the latency, in steps that can be done apart.

    python -m bench.gpu --data SRC                         # all steps, in the order of their worth
    python -m bench.gpu --data SRC --minutes 9             # what fits; the same line goes on from there
    python -m bench.gpu --data SRC --pieces check,card     # some pieces
    python -m bench.gpu certify --data SRC                 # exported files and certificates, on a CPU afterwards
    python -m bench.gpu --summary --write README.md        # the tables, between README's markers

OUT/DEVICE-DATE/PIECE.json is written anew after each measurement. A call that is interrupted, or whose time is up,
keeps what was measured, and the same command goes on from there; what is done is skipped, unless `--again`. Study
directories, decoded images and exported files are in OUT/DEVICE-DATE/work. On CUDA the steps have a process of their
own, and a new one after a step that broke the device or did not end.

A machine without a network, lent for minutes at a time, gets one file, and gives one file back:

    python -m bench.gpu pack runs/gpu.tar --data SRC       # here; prints the next line
    python3 -m bench.gpu.archive runs/gpu.tar --minutes 9 --keep KEPT.tgz        # there, in a checkout
    python -m bench.gpu schedule --faster 300 --minutes 15                       # what would fit

KEPT.tgz has all results without weights: it is read first, where it is there, and written after each measurement.
`--smoke` does all steps small, on a CPU too: it shows that everything runs, and its numbers say nothing. Of several
GPUs the first is measured; CUDA_VISIBLE_DEVICES says which that is.
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
from bench.gpu import archive, runner, tables
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
    keep: Annotated[Path | None, typer.Option(help="File with all results: read first, written always.")] = None,
    minutes: Annotated[float, typer.Option(help="That this call may take.")] = 25.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="All steps small, on a CPU too.")] = False,
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
    return runner.run(runner.Asked(pieces, data, device, out, keep, minutes, smoke, again, without_paths))


def pack(
    file: Annotated[Path, typer.Argument(help="The archive; a file that git ignores, such as runs/gpu.tar.")],
    data: Annotated[str | None, typer.Option(help="Data source to take along: parquet:DIR, folder:DIR.")] = None,
) -> int:
    """Write the archive for a machine without a network, and print the line that starts it there."""
    line = archive.pack(file, data)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB; there, in a checkout that has this file:\n\n    {line}\n")
    return 0


def certify(
    directory: Annotated[Path | None, typer.Argument(help="Results; the newest if not given.")] = None,
    data: Annotated[str, typer.Option(help="Data source that the networks were trained on.")] = "cifar10",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = runner.RESULTS,
    smoke: Annotated[bool, typer.Option("--smoke", help="In one precision.")] = False,
) -> int:
    """Export what was trained, with certificates, on a CPU."""
    place = directory or tables.newest(out)
    if place is None:
        raise InputError(f"{out}: has no results")
    from bench.gpu.certify import certify  # which needs ONNX Runtime

    return certify(place, data, smoke)


def schedule(
    faster: Annotated[float, typer.Option(min=0.001, help="Than the CPU of the kept records, in training.")],
    minutes: Annotated[float, typer.Option(min=1, max=runner.LONGEST_MINUTES, help="Of the call.")] = 25.0,
) -> int:
    """Simulate a call: what is done when, and what a cut after each minute would leave."""
    from bench.gpu.schedule import show

    return show(minutes, faster)


COMMANDS = {"pack": pack, "certify": certify, "schedule": schedule}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 some step is not, 2 the input is wrong, 130 stopped by the user."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _stop)
    try:
        if arguments and arguments[0] in COMMANDS:
            return command.run(COMMANDS[arguments[0]], arguments[1:])
        return command.run(gpu, arguments)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return command.INTERRUPTED


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""What the commands that measure presets have in common: their options, their record, and how they show it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, Field
from tabulate import tabulate

from bench.host import Host
from bench.latency import machine
from model.files import now, write_whole

Presets = Annotated[list[str] | None, typer.Argument(metavar="[PRESET]...", help="All, if none is named.")]
Batches = Annotated[list[int] | None, typer.Option(min=1, help="Batch size. Repeatable. Default: 1, 8, 64.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Keep what was measured.")]

BATCHES = (1, 8, 64)


class Record(BaseModel):
    """What was measured on one machine."""

    machine: dict[str, str | int] = Field(default_factory=machine)
    host: Host
    finished: str = ""

    def keep(self, out: Path | None, *rows: dict[str, object]) -> None:
        """Keeps the record as it is now in `out`, where that is given, and says what was measured last."""
        self._write(out)
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)

    def show(self, rows: Sequence[dict[str, object]], note: str, out: Path | None) -> None:
        """Keeps the whole record, and prints its rows with what a reader must know."""
        self._write(out)
        print(tabulate(rows, headers="keys", disable_numparse=True))
        print("\n".join(["", note, *self.host.notes()]))

    def _write(self, out: Path | None) -> None:
        self.finished = now()
        if out:
            write_whole(out, self.model_dump_json(indent=1).encode())

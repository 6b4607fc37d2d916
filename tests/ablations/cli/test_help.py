"""The door: what help says, and what it and other commands import."""

import json
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import typer
from conftest import REPOSITORY

from expertgrid.ablations.cli import options
from expertgrid.ablations.cli.app import PANELS, app

COMMANDS = typer.main.get_command(app).commands

IMPORTED = """
import contextlib, io, json, sys
from expertgrid.ablations.cli import entry

status = {}
for arguments in json.loads(sys.argv.pop()):
    sys.argv = ["expertgrid", *arguments]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as shown:
        try:
            entry.main()
        except SystemExit as end:
            status[" ".join(arguments)] = (end.code or 0, shown.tell())
print(json.dumps([status, sorted(sys.modules)]))
"""


def imported_by(lines: list[list[str]], place) -> set[str]:
    """The modules that command lines import, all in one fresh interpreter. Each must print something and succeed."""
    call = [sys.executable, "-c", IMPORTED, json.dumps(lines)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout)
    assert len(status) == len(lines)
    assert all(code == 0 and shown for code, shown in status.values()), (status, done.stderr)
    return set(modules)


def test_no_help_imports_anything_that_takes_long(tmp_path):
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    assert imported_by(lines, tmp_path) & {"torch", "numpy", "pydantic", "scipy", "timm", "onnx"} == set()


def test_everything_has_its_help_and_the_list_of_commands_cuts_none(expertgrid):
    assert [(name, p.name) for name, command in COMMANDS.items() for p in command.params if not p.help] == []
    shown = expertgrid("--help").out
    assert expertgrid().out == shown
    for name, command in COMMANDS.items():
        first = command.help.split("\n\n")[0].removesuffix(".")
        assert f" {name} {' '.join(first.split())}" in " ".join(shown.split())
    for title in ("Train", "Read results", "Use a trained network", "Measure speed", "Look up"):
        assert f"\n{title}:\n" in shown


def test_the_words_of_the_options_are_those_of_the_code():
    """They are written out beside the signatures, where importing them would take seconds."""
    from expertgrid.bench.engines import ENGINES
    from expertgrid.export.certificate import BOUNDS
    from expertgrid.export.session import ORT_PROVIDERS, PROVIDERS
    from expertgrid.export.to_onnx import OUTPUTS
    from expertgrid.model.fast.execution import CHOICES
    from expertgrid.model.system.text import FORMATS

    def words(command, option):
        callback = next(info.callback for info in app.registered_commands if info.callback.__name__ == command)
        return get_args(get_type_hints(callback)[option])

    assert words("table", "format") == (*FORMATS, "parquet")
    assert words("export", "precision") == (*BOUNDS, "all")
    assert words("bench", "provider") == options.ORT_PROVIDERS == tuple(ORT_PROVIDERS)
    assert options.PROVIDERS == PROVIDERS
    assert get_args(words("predict", "provider")[0]) == PROVIDERS
    assert words("run", "kernels") == words("run", "compile") == words("run", "graphs") == tuple(CHOICES)
    assert tuple(OUTPUTS) == options.OUTPUTS
    assert options.ENGINES == ENGINES


def test_the_start_is_announced_before_torch_is_imported():
    """On a terminal; a file gets nothing of it."""
    interrupted_import = """
import sys
from expertgrid.ablations.cli import entry

class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
sys.argv = ["expertgrid", "bench-train"]
entry.main()
"""
    line = [sys.executable, "-c", interrupted_import]
    ours, theirs = os.openpty()
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert (done.returncode, done.stdout) == (130, b"")
    assert "starting: loading PyTorch" in shown
    assert "stopped" in shown

    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; finished work is kept\n")


def test_what_needs_no_network_imports_nothing_slow(trained_study):
    """Lists, tables, checks, and the plan of a study; verdicts need no slow part of scipy."""
    lines = [
        *(["list", what] for what in ("models", "recipes", "studies", "data")),
        ["run", "quickstart", "--dry-run"],
        ["bench", "--help"],
    ]
    study, slow = str(trained_study), {"torch", "torchvision", "timm", "onnx"}
    assert imported_by(lines, trained_study.parent.parent) & slow == set()
    of_records = imported_by([["table", study], ["table", study, "--by", "experts"], ["check", study]], REPOSITORY)
    assert of_records & (slow | {"pandas", "scipy.stats", "scipy.optimize"}) == set()


def test_a_long_list_of_options_is_in_panels(expertgrid):
    """Each option is in one of them, and each name in the table of panels is an option's of some command."""
    named = {name for names in PANELS.values() for name in names.split()}
    assert named <= {param.name for command in COMMANDS.values() for param in command.params}
    titles = re.findall(r"^(\w[\w ]*):$", expertgrid("run", "--help").out, re.MULTILINE)
    assert titles == ["Arguments", "Study", "Machine", "Failures", "Output", "Options"]
    for name, command in COMMANDS.items():
        words = re.findall(r"^  (-\S+)", expertgrid(name, "--help").out, re.MULTILINE)
        assert set(words) == {"-h,", *(p.opts[0] for p in command.params if p.param_type_name == "option")}
    assert "\nStudy:" not in expertgrid("clean", "--help").out

"""The rules that the source keeps: who imports whom, and what the README promises."""

import ast
import importlib
import importlib.util
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from conftest import REPOSITORY

from ablations.cli.app import app

PACKAGES = ("model", "export", "ablations", "bench")
SOURCES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]

# Each step with the modules on it, from the lowest. A step imports itself and the steps that are named for it.
STEPS = {
    "model": ("model",),
    "export": ("export",),
    "training": ("ablations.training",),
    "study": ("ablations.cells", "ablations.study", "ablations.records"),
    "results": ("ablations.results",),
    "engines": (
        "ablations.events",
        "ablations.engines",
        "ablations.isolation",
        "ablations.gpu_sharing",
        "ablations.preloaded",
        "ablations.scheduling",
        "ablations.ray_engine",
        "ablations.racing",
        "ablations.rerun",
        "ablations.verify",
        "ablations.progress",
        "ablations.check",
        "ablations.clean",
        "ablations.disk",
        "ablations.trackers",
    ),
    "bench": ("bench",),
    "cli": ("ablations.cli", "ablations.__main__"),
}
MAY_IMPORT = {
    "model": {"model"},
    "export": {"export", "model"},
    "training": {"training", "model"},
    "study": {"study", "training", "model"},
    "results": {"results", "study", "training", "model"},
    "engines": {"engines", "results", "study", "training", "export", "model"},
    "bench": set(STEPS) - {"cli"},
    "cli": set(STEPS),
}
COMMANDS = typer.main.get_command(app).commands
AT_ONCE = (
    "app",
    "entry",
    "interrupt",
    "options",
    "terminal",
)  # files of the command line that are imported for help and errors


def step_of(module: str) -> str | None:
    """The step that a module is on, None for a package that is none: `ablations` itself, whose file is empty."""
    for step, places in STEPS.items():
        if any(module == place or module.startswith(f"{place}.") for place in places):
            return step
    assert module == "ablations", f"{module}: on no step"
    return None


def is_module(name: str) -> bool:
    place = REPOSITORY.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place.is_dir() and name.split(".")[0] in PACKAGES)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that the code below a node imports, calls by name, or has another interpreter import."""
    prose = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module.split(".")[0] in PACKAGES:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if is_module(name) else node.module for name in full)
        elif isinstance(node, ast.List | ast.Tuple):
            yield from _called(node.elts)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (word for word in _texts(node.args) if word.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from _in_text(node.value)


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


def _texts(nodes: list[ast.expr]) -> list[str]:
    return [node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "" for node in nodes]


def _called(elements: list[ast.expr]) -> Iterator[str]:
    """What a command, as a list of words, runs: `-m` and a module, or the command line itself."""
    words = _texts(elements)
    yield from (word for flag, word in zip(words, words[1:]) if flag == "-m" and word.split(".")[0] in PACKAGES)
    if words[:1] == ["expertgrid"] and words[1:2] and words[1] in COMMANDS:
        yield "ablations.cli"


def _in_text(text: str) -> Iterator[str]:
    """Modules in a string: a dotted name that is one, code that imports, a shell's command."""
    if re.fullmatch(r"\w+(\.\w+)+", text) and text.split(".")[0] in PACKAGES and is_module(text):
        yield text
    found = re.findall(r"(?:^|[\n;])\s*(?:from|import)\s+([\w.]+)|(?:^|\s)-m\s+([\w.]+)", text)
    yield from (name for pair in found for name in pair if name.split(".")[0] in PACKAGES)


def module_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_step_imports_a_higher_one(path):
    step = step_of(module_of(path))
    found = {module: step_of(module) for module in imported(ast.parse(path.read_text()))}
    if step is None:
        assert not found
        return
    wrong = {module: other for module, other in found.items() if other and other not in MAY_IMPORT[step]}
    assert not wrong, f"{path.relative_to(REPOSITORY)} is on the step {step}"


@pytest.mark.parametrize(
    ("code", "module"),
    [
        ("def f():\n    from bench.latency import measure", "bench.latency"),
        ("from ablations import records, racing", "ablations.racing"),
        ("import ablations.cli.app as app", "ablations.cli.app"),
        ("subprocess.run([sys.executable, '-m', 'ablations', 'run'])", "ablations"),
        ("CODE = 'import sys; from ablations.cli.entry import main'", "ablations.cli.entry"),
        ("run(f'{python} -m bench.gpu --size {size}', shell=True)", "bench.gpu"),
        ("subprocess.run(('expertgrid', 'run', study))", "ablations.cli"),
        ("importlib.import_module('bench')", "bench"),
        ("PIECES = {'step': 'bench.step'}", "bench.step"),
    ],
)
def test_each_way_to_import_is_seen(code, module):
    assert module in set(imported(ast.parse(code)))


def test_prose_and_folders_are_no_imports():
    lines = [
        '"""See bench.step, or python -m bench.gpu."""',
        'place = study / "bench"',
        'note = "the model bench.step"',
    ]
    code = "\n".join([*lines, 'packages = ("expertgrid", "torch")'])
    assert set(imported(ast.parse(code))) == set()


@pytest.mark.parametrize("name", AT_ONCE)
def test_the_door_imports_nothing_that_takes_long(name):
    """Outside of its functions."""
    found = set()
    for node in ast.parse((REPOSITORY / "ablations" / "cli" / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {module for module in found if module.split(".")[0] in PACKAGES}
    others = {module.split(".")[0] for module in found - ours}
    assert ours <= {
        "ablations.cli.interrupt",
        "ablations.cli.interrupt.INTERRUPTED",
        "ablations.cli.options",
        "model.errors.InputError",
        "model.errors.unknown",
        "model.files.write_whole",
    }
    assert others - set(sys.stdlib_module_names) <= {"app": {"typer"}, "terminal": {"rich"}}.get(name, set())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_imported(package):
    """With the versions that are installed: `.ci/run` has the lowest that are allowed, too."""
    for path in (path for path in SOURCES if path.parts[len(REPOSITORY.parts)] == package):
        if path.name != "kernels.py" or importlib.util.find_spec("triton"):
            importlib.import_module(module_of(path))


def test_names_of_files():
    assert not {"utils.py", "helpers.py", "common.py", "misc.py"} & {path.name for path in SOURCES}


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "pynvml": "nvidia-ml-py"}
    names |= {"huggingface_hub": "huggingface-hub", "mlperf_loadgen": "mlcommons-loadgen"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules} - set(PACKAGES) - set(sys.stdlib_module_names):
                assert names.get(module, module) in declared, f"{path}: {module}"


def test_readme_has_two_commands_and_ci_runs_the_second():
    readme = (REPOSITORY / "README.md").read_text()
    run, tests = (line for line in readme.splitlines() if line.startswith("python3 -m venv .venv && "))
    assert run.endswith("expertgrid run")
    assert tests in (REPOSITORY / ".ci" / "run").read_text()


def test_files_that_the_readme_shows_are_there():
    readme = (REPOSITORY / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme)
    assert links
    assert [link for link in links if not Path(REPOSITORY, link).exists()] == []

"""The rules that the source keeps: who imports whom, and what the README promises."""

import ast
import graphlib
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

from expertgrid.ablations.cli.app import app

FOLDERS = ("model", "export", "bench", "ablations")  # a line: each may import itself and those before it
SOURCES = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]

# Within a folder of the line: each folder in it may import itself, and those that are named for it.
WITHIN = {
    "model": {
        "system": (),
        "": ("system", "training"),  # the files that lie in `model` itself
        "fast": ("", "system"),
        "training": ("", "fast", "system"),
    },
    "ablations": {
        "study": (),
        "records": ("study",),
        "engines": ("records", "study"),
        "results": ("records", "study"),
        "speed": ("engines", "results", "records", "study"),
        "trackers": ("results", "engines", "records", "study"),
        "cli": ("trackers", "speed", "results", "engines", "records", "study"),
        "": ("cli", "trackers", "speed", "results", "engines", "records", "study"),  # the library
    },
}
COMMANDS = typer.main.get_command(app).commands
AT_ONCE = ("app", "entry", "interrupt", "options", "terminal")  # of the command line, for help and errors
PAGES = [*REPOSITORY.glob("*.md"), *(page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("README.md"))]


def is_module(name: str) -> bool:
    place = REPOSITORY.joinpath("src", *name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "expertgrid"


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of ours that the code below a node imports, calls by name, or has another interpreter import."""
    prose = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if is_ours(node.module):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if is_module(name) else node.module for name in full)
        elif isinstance(node, ast.List | ast.Tuple):
            yield from _called(node.elts)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from filter(is_ours, _texts(node.args))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from _in_text(node.value)


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


def _texts(nodes: list[ast.expr]) -> list[str]:
    return [node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "" for node in nodes]


def _called(elements: list[ast.expr]) -> Iterator[str]:
    """What a command, as a list of words, runs: the command line, which is the last folder."""
    words = _texts(elements)
    if words[:1] == ["expertgrid"] and words[1:2] and words[1] in COMMANDS:
        yield "expertgrid.ablations.cli"
    yield from (word for flag, word in zip(words, words[1:]) if flag == "-m" and is_ours(word))


def _in_text(text: str) -> Iterator[str]:
    """Modules in a string: a dotted name that is one, code that imports, a shell's command."""
    if re.fullmatch(r"\w+(\.\w+)+", text) and is_ours(text) and is_module(text):
        yield text
    matches = re.findall(r"(?:^|[\n;])\s*(?:from|import)\s+([\w.]+)|(?:^|\s)-m\s+([\w.]+)", text)
    yield from (name for pair in matches for name in pair if is_ours(name))


def module_of(path: Path) -> str:
    parts = ("expertgrid", *path.relative_to(REPOSITORY).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rooms(module: str) -> tuple[str, str]:
    """The folder of the line that a module is in, and the folder in that: "" for a file in the first itself.

    The front and the command's start, `expertgrid` and `expertgrid.__main__`, belong to the end of the line.
    """
    parts = module.split(".")[1:]
    if parts[:1] in ([], ["__main__"]):
        return "ablations", ""
    inner = parts[1] if len(parts) > 1 and parts[1] in WITHIN.get(parts[0], ()) else ""
    return parts[0], inner


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_folder_imports_a_later_one(path):
    outer, inner = rooms(module_of(path))
    for module in imported(ast.parse(path.read_text())):
        to, inner_to = rooms(module)
        assert FOLDERS.index(to) <= FOLDERS.index(outer), f"{path}: imports {module}"
        if to == outer and to in WITHIN and module not in ("expertgrid", f"expertgrid.{to}"):
            assert inner_to in (inner, *WITHIN[to][inner]), f"{path}: imports {module}"


def test_no_files_import_each_other_in_a_circle():
    """At the top level of a module or in a function."""
    graph = {module_of(path): set(imported(ast.parse(path.read_text()))) for path in SOURCES}
    ours = {
        module: {other for other in others if other in graph and other != module} for module, others in graph.items()
    }
    graphlib.TopologicalSorter(ours).prepare()  # which raises CycleError


@pytest.mark.parametrize(
    ("code", "module"),
    [
        ("def f():\n    from expertgrid.bench.latency import measure", "expertgrid.bench.latency"),
        ("from expertgrid.ablations.records import directory, plan", "expertgrid.ablations.records.directory"),
        ("import expertgrid.ablations.cli.app as app", "expertgrid.ablations.cli.app"),
        ("subprocess.run([sys.executable, '-m', 'expertgrid', 'run'])", "expertgrid"),
        ("CODE = 'import sys; from expertgrid.bench.host import Host'", "expertgrid.bench.host"),
        ("run(f'{python} -m expertgrid --size {size}', shell=True)", "expertgrid"),
        ("subprocess.run(('expertgrid', 'run', study))", "expertgrid.ablations.cli"),
        ("importlib.import_module('expertgrid.bench')", "expertgrid.bench"),
        ("PIECES = {'step': 'expertgrid.bench.timing'}", "expertgrid.bench.timing"),
    ],
)
def test_each_way_to_import_is_seen(code, module):
    assert module in set(imported(ast.parse(code)))


def test_prose_and_folders_are_no_imports():
    lines = [
        '"""See expertgrid.bench.step, or python -m bench.gpu."""',
        'place = study / "bench"',
        'note = "the model expertgrid.bench.step"',
    ]
    code = "\n".join([*lines, 'packages = ("expertgrid", "torch")'])
    assert set(imported(ast.parse(code))) == set()


@pytest.mark.parametrize("name", AT_ONCE)
def test_the_door_imports_nothing_that_takes_long(name):
    """Outside of its functions."""
    tree = ast.parse((REPOSITORY / "ablations" / "cli" / f"{name}.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    light = {"model.system.errors", "model.system.files", "ablations.cli.interrupt", "ablations.cli.options"}
    assert set(imported(tree)) <= {f"expertgrid.{name}" for name in light}
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names if not is_ours(name)} - set(sys.stdlib_module_names)
    assert others <= {"app": {"typer"}, "terminal": {"rich"}}.get(name, set())


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_is_imported(folder):
    """With the versions that are installed: `.ci/run` has the lowest that are allowed, too."""
    for path in (path for path in SOURCES if path.parts[len(REPOSITORY.parts)] == folder):
        if path.name != "kernels.py" or importlib.util.find_spec("triton"):
            importlib.import_module(module_of(path))


def test_names_of_files():
    assert not {"utils.py", "helpers.py", "common.py", "misc.py"} & {path.name for path in SOURCES}


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "pynvml": "nvidia-ml-py"}
    names |= {"huggingface_hub": "huggingface-hub"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules} - {"expertgrid"} - set(sys.stdlib_module_names):
                assert names.get(module, module) in declared, f"{path}: {module}"


def test_readme_has_two_commands_and_ci_runs_the_second():
    readme = (REPOSITORY / "README.md").read_text()
    run, tests = (line for line in readme.splitlines() if line.startswith("python3 -m venv .venv && "))
    assert run.endswith("expertgrid run")
    assert tests in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_commands_of_a_page_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    shown = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    assert set(re.findall(r"expertgrid ([a-z-]+)", shown)) <= {*COMMANDS, "--help"}

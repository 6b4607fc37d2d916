"""The rules that the source keeps: who imports whom, and what the README promises."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGES = ("model", "ablations", "export", "bench")
ALLOWED = {"model": set(), "ablations": {"model"}, "export": {"model"}, "bench": {"model", "export", "ablations"}}
SOURCES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def imports(nodes: list[ast.stmt]) -> set[str]:
    """The packages of ours that are imported anywhere below the nodes."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module.split(".")[0])
    return found & set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports(path):
    package = path.relative_to(REPOSITORY).parts[0]
    body = ast.parse(path.read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    if path.parent.name == "cli":  # its commands may import what they need
        assert imports(functions) <= {"model", "export", "bench"}
        body = [node for node in body if node not in functions and "TYPE_CHECKING" not in ast.unparse(node)]
    assert imports(body) - {package} <= ALLOWED[package]


def test_names_of_files_and_length_of_functions():
    assert not {"utils.py", "helpers.py", "common.py", "misc.py"} & {path.name for path in SOURCES}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}: {node.name}"


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w"}
    import sys

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

"""What reading a file or its certificate must not import: the runtime and the layout of drawings take long to load."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def imported(module: str) -> set[str]:
    """The modules that are imported when `module` is, of ours with all that they import; not those in functions."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        file = REPOSITORY / (name.replace(".", "/") + ".py")
        if name in found or not file.exists():
            found.add(name)
            continue
        found.add(name)
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {name.partition(".")[0] for name in found if not name.startswith("export.")} | found


@pytest.mark.parametrize("name", ["metadata", "certificate", "graph", "picture", "card", "fuse"])
def test_reading_a_file_needs_no_runtime(name):
    found = imported(f"export.{name}")
    assert {"pydantic", "model"} <= found
    assert not {"onnxruntime", "grandalf", "ablations", "bench"} & found


def test_the_export_does_not_know_the_ablations():
    for file in sorted((REPOSITORY / "export").glob("*.py")):
        assert not {"ablations", "bench"} & imported(f"export.{file.stem}")
    assert "onnxruntime" in imported("expertgrid.export.certify")  # this test would see it

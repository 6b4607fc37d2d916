"""What an import brings along, seen in one fresh interpreter."""

import json
import subprocess
import sys

PROGRAM = """
import importlib, importlib.util, json, sys

found = {"registered": []}

import expertgrid.model.system.errors
found["errors"] = sorted({"pydantic", "torch", "timm", "numpy"} & set(sys.modules))
for name in ("config", "cost", "system.files", "system.machine", "presets", "variants"):
    importlib.import_module(f"expertgrid.model.{name}")
for name in ("cpu_name", "usable_cores", "memory_bytes", "gpu_driver", "checkout_commit"):
    getattr(expertgrid.model.system.machine, name)()
config = expertgrid.model.presets.network("eight_block")
expertgrid.model.cost.cost(expertgrid.model.variants.vary(config, "matched", "params"), 32, 32)
found["data"] = sorted({"torch", "timm", "numpy"} & set(sys.modules))
import timm
found["same"] = timm.create_model("expertnet_eight_block").config == config
found["loader"] = type(timm.__spec__.loader).__name__

for name in ("metadata", "certificate", "describe", "card", "rewrites"):  # reading a file needs no runtime
    importlib.import_module(f"expertgrid.export.{name}")
found["export"] = sorted({"onnxruntime", "openvino", "expertgrid.bench", "expertgrid.ablations"} & set(sys.modules))

PACKAGE = "expertgrid.model"
for order in (f"{PACKAGE}, timm", f"timm, {PACKAGE}", f"{PACKAGE}, timm.layers", f"{PACKAGE}.net"):
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "expertgrid")]:
        del sys.modules[name]  # torch stays, which takes seconds to import
    for name in order.split(", "):
        assert importlib.util.find_spec(name.split(".")[0])  # looking for a package changes nothing
        importlib.import_module(name)
    found["registered"].append(sys.modules["timm"].is_model("expertnet_eight_block"))
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == PACKAGE]
print(json.dumps(found))
"""


def test_data_imports_no_torch_and_presets_are_registered_when_timm_is_imported():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"errors": [], "data": [], "export": [], "same": True, "loader": "SourceFileLoader"}
    assert json.loads(done.stdout) == expected | {"registered": [True] * 4}

"""The fused kernels, compiled for GPUs that need not be here: their registers, and what they spill."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="there is no Triton")

# A training step on tensors without values has each kernel compiled in the form in which it would be started. How many
# forms there are, and what the assembler made of each, is printed: registers and bytes of the stack of a thread, which
# has what is spilled, and whether some load takes 16 bytes at once.
COMPILED = """
import json, re, subprocess, sys, tempfile
import torch, triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from expertgrid.model.fast import kernels
from expertgrid.model.presets import PRESETS
from expertgrid.model.registry import build

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

class Compiled:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            made = self.kernel.warmup(*args, grid=grid, **kwargs)
            compiled[id(made)] = made
        return compile

compiled = {}
driver.set_active(Driver())
FakeTensor.data_ptr = lambda tensor: 0  # as aligned as those of PyTorch
for name, kernel in list(vars(kernels).items()):
    if isinstance(kernel, JITFunction) and not name.startswith("_tile_of"):
        setattr(kernels, name, Compiled(kernel))
for batch in (64, 512):
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        net = build(PRESETS[sys.argv[2]]).train()
        kernels.fuse(net)
        net(torch.empty(batch, 3, 32, 32, memory_format=torch.channels_last)).float().sum().backward()
for made in compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        used = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, *re.findall(r"REG:(\\d+) STACK:(\\d+) .*?LOCAL:(\\d+)", used))
    print(json.dumps([made.name, registers, stack + local, "ld.global.v4.b32" in made.asm["ptx"]]))
"""


@pytest.mark.nightly  # minutes: Triton compiles each form
@pytest.mark.skipif(sys.platform != "linux", reason="Triton has its assembler there")
@pytest.mark.parametrize("preset", ["two_block", "eight_block", "speed"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_no_kernel_spills(capability, preset):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, capability, preset]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    forms = [json.loads(line) for line in done.stdout.splitlines()]
    names = [name for name, *_ in forms]
    assert set(names) >= {"_gate", "_gate_gradient", "_layer_gradient", "_mix", "_gradient", "_gradient_sums"}
    for name, registers, spilled_bytes, has_wide_loads in forms:
        assert spilled_bytes == 0, name
        assert 16 <= registers <= 255
        assert has_wide_loads or "gate" in name or name in ("_layer_gradient", "_statistics"), name
    if preset == "two_block":  # one for the maps of one conv and one for those of four, whatever the number of steps
        assert names.count("_tile_statistics") == 2

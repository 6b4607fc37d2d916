"""The fused kernels as they are compiled for a GPU, which need not be here: their registers, and what they spill.

    python -m bench.kernels eight_block speed

A training step of each preset is taken on tensors without values, and each kernel that it starts is compiled in the
form in which it is started. What the assembler made of it is read from the machine code. A kernel that needs more
registers than a thread has keeps some of its values in memory: it spills.
"""

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import triton
import triton.knobs
import typer
from pydantic import BaseModel
from tabulate import tabulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import KernelInterface

from bench import command
from bench.floor import config_of
from model.config import ModelConfig
from model.errors import InputError
from model.fast import kernels
from model.registry import build

CAPABILITIES = (80, 90)  # compute capability, without its point
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
WARP = 32  # threads
WIDE_LOADS = "ld.global.v4.b32"  # in PTX: 16 bytes at once, the most that a thread can ask for


class Form(BaseModel, frozen=True):
    """How a kernel is compiled: the type of each argument, those known to the compiler, and those divisible by 16."""

    kernel: str
    types: tuple[tuple[str, str], ...]  # by argument; "constexpr" for the known ones
    known: tuple[tuple[str, int | bool | None], ...]
    divisible: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.known if name.isupper())


class Compiled(BaseModel):
    """What a kernel needs on a GPU of some compute capability."""

    kernel: str
    form: str
    capability: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    wide_loads: bool  # whether some load takes 16 bytes at once


def forms(config: ModelConfig, batch: int, size: int) -> list[Form]:
    """The forms of all kernels that a training step in bfloat16 starts, on `batch` images of `size` x `size` pixels."""
    found: list[tuple[str, dict[str, Any]]] = []
    with seen(lambda name, given: found.append((name, given))), FakeTensorMode():
        net = build(config).train()
        kernels.fuse(net)
        x_BCHW = torch.empty(batch, config.in_chans, size, size, memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BN = net(x_BCHW)
        logits_BN.float().sum().backward()
    return list(dict.fromkeys(_form(name, given) for name, given in found))


@contextmanager
def seen(see: Callable[[str, dict[str, Any]], object]) -> Generator[None]:
    """Within, kernels are not started, and `see` is given the name and the arguments of each that would be."""
    ours = {name: kernel for name, kernel in vars(kernels).items() if isinstance(kernel, KernelInterface)}
    try:
        for name, kernel in ours.items():
            setattr(kernels, name, _Seen(name, inspect.signature(kernel.fn), see))
        yield
    finally:
        for name, kernel in ours.items():
            setattr(kernels, name, kernel)


class _Seen:
    """A kernel that is seen and not started."""

    def __init__(self, name: str, signature: inspect.Signature, see: Callable[[str, dict[str, Any]], object]):
        self.name, self.signature, self.see = name, signature, see

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *args, **kwargs: self.see(self.name, self.signature.bind(*args, **kwargs).arguments)


def _form(name: str, given: dict[str, Any]) -> Form:
    """What Triton makes of the arguments of a start: it takes None and 1 as known, and notes what 16 divides."""
    types: dict[str, str] = {}
    known: dict[str, int | bool | None] = {}
    divisible = []
    for parameter in getattr(kernels, name).params:
        value = given[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            types[parameter.name], known[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not free):
            divisible.append(parameter.name)
    return Form(kernel=name, types=tuple(types.items()), known=tuple(known.items()), divisible=tuple(divisible))


def compiled(form: Form, capability: int, **options: int) -> Compiled:
    """The form compiled for a capability; `options` are Triton's."""
    function, types = getattr(kernels, form.kernel), dict(form.types)
    attributes = {(list(types).index(name),): [["tt.divisibility", 16]] for name in form.divisible}
    source = ASTSource(function, types, dict(form.known), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(
        kernel=form.kernel,
        form=str(form),
        capability=capability,
        registers=registers,
        spilled_bytes=spilled,
        wide_loads=WIDE_LOADS in made.asm["ptx"],
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, which has what is spilled: Triton's kernels keep nothing else.

    As the machine code says it, by the tool of CUDA that is in Triton's package.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.knobs.nvidia.cuobjdump.path)
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", run.stdout)
    registers, stack, local = map(int, used)
    return registers, stack + local


def kernels_command(
    presets: Annotated[list[str], typer.Argument(help="Networks.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    format: Annotated[Literal["text", "json"], typer.Option(help="text or json.")] = "text",
) -> int:
    """Compile the fused kernels of some networks, and show their registers and spills."""
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set: kernels are then interpreted, not compiled")
    wanted: dict[Form, None] = {}
    for preset in presets:
        wanted |= dict.fromkeys(forms(config_of(preset, size), batch, size))
    found = [compiled(form, capability) for form in wanted for capability in CAPABILITIES]
    if format == "json":
        print("[" + ",\n".join(kernel.model_dump_json() for kernel in found) + "]")
        return 0
    rows = [
        (kernel.kernel, kernel.form, f"{kernel.capability / 10}", kernel.registers, kernel.spilled_bytes)
        for kernel in found
    ]
    print(tabulate(rows, headers=("kernel", "form", "capability", "registers", "spilled bytes"), disable_numparse=True))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the input is wrong."""
    return command.run(kernels_command, arguments)


if __name__ == "__main__":
    sys.exit(main())

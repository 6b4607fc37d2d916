"""A training step as a CUDA graph: recorded once for each batch size, and replayed.

A step of these networks is some thousand kernels of a few microseconds each. Python launches them more slowly than the
device runs them; a graph launches all of them at once. A recorded step must not wait for the device. It must read what
changes from step to step from tensors at fixed addresses: the batch, and the learning rates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from expertgrid.model.system.errors import InputError, reason_of

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
Recording = tuple[Callable[[], object], Tensors]  # a function that replays a step, and the tensors that it fills

WARM_UP = 3  # steps before the recorded one: libraries choose kernels, and optimisers create their state


class RecordingError(InputError):
    """A training step cannot be recorded. PyTorch's stream, random numbers and memory are left in the middle of it."""


def recordable(optimizer: Optimizer) -> bool:
    """Whether a graph can hold the optimiser's step: it counts steps on the device and reads its rate from a tensor."""
    return bool(optimizer.defaults.get("capturable") or optimizer.defaults.get("fused"))


@dataclass
class _Tape:
    """The steps on batches of one size."""

    inputs: Tensors
    done: int = 0
    replay: Callable[[], object] | None = None
    outputs: Tensors = ()


class Recorder:
    """Runs training steps: for each batch size the first ones directly, and the later ones as replays of a graph."""

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self.optimizer, self.device = optimizer, device
        self.tapes: dict[tuple, _Tape] = {}
        self.learning_rates_G = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._prepare()

    def _prepare(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, *inputs: Tensor) -> Tensors:
        """The result of `step` for these tensors. `step` must be the same function for all batches of one size.

        The next step overwrites the result. Raises RecordingError, after which CUDA must not be used in this process.
        """
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.tapes:
            self.tapes[key] = _Tape(tuple(map(torch.empty_like, inputs)))
        tape = self.tapes[key]
        for fixed, x in zip(tape.inputs, inputs):
            fixed.copy_(x)
        tape.done += 1
        if tape.done <= WARM_UP:
            return self._aside(lambda: step(*tape.inputs))
        for on_device, group in zip(self.learning_rates_G, self.optimizer.param_groups):
            on_device.fill_(group["lr"])
        if tape.replay is None:
            try:
                tape.replay, tape.outputs = self._recorded(lambda: step(*tape.inputs))
            except RuntimeError as error:
                text = "a training step cannot be recorded as a CUDA graph, which --graphs off leaves out"
                raise RecordingError(f"{text}: {reason_of(error)}") from error
        tape.replay()
        return tape.outputs

    def _recorded(self, step: Callable[[], Tensors]) -> Recording:
        """Records a step that reads its learning rates from tensors."""
        groups = self.optimizer.param_groups
        learning_rates = [group["lr"] for group in groups]
        for group, on_device in zip(groups, self.learning_rates_G):
            group["lr"] = on_device
        try:
            return self._record(step)
        finally:
            for group, learning_rate in zip(groups, learning_rates):
                group["lr"] = learning_rate

    def _aside(self, step: Callable[[], Tensors]) -> Tensors:
        """Runs a step on the stream of the later recording: autograd's state belongs to a stream."""
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            outputs = step()
        usual.wait_stream(self.stream)
        return outputs

    def _record(self, step: Callable[[], Tensors]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # Only calls of this thread that a recording forbids are errors: other threads pin memory meanwhile.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = step()
        return graph.replay, outputs

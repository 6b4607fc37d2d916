"""A training step as a CUDA graph: recorded once for each batch size, and replayed.

A step of these networks is some thousand kernels of a few microseconds each. Python launches them more slowly than the
device runs them; a graph launches all of them at once. A recorded step must not wait for the device. It must read what
changes from step to step from tensors at fixed addresses: the batch, and the learning rates.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from expertgrid.model.system.errors import reason_of

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
Recording = tuple[Callable[[], object], Tensors]  # a function that replays a step, and the tensors that it fills

WARM_UP = 3  # steps before the recorded one: libraries choose kernels, and optimisers create their state


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
    """Runs training steps: for each batch size the first ones directly, and the later ones as replays of a graph.

    Where recording fails, a strict recorder raises the error. Any other runs all steps directly from then on, and
    `refused` is the reason.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, strict: bool = False):
        self.optimizer, self.device, self.strict = optimizer, device, strict
        self.refused: str | None = None
        self.tapes: dict[tuple, _Tape] = {}
        self.rates_G = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._prepare()

    def _prepare(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, *given: Tensor) -> Tensors:
        """The result of `step` for these tensors. `step` must be the same function for all batches of one size.

        The next step overwrites the result.
        """
        if self.refused is not None:
            return step(*given)
        key = tuple((x.shape, x.dtype) for x in given)
        if key not in self.tapes:
            self.tapes[key] = _Tape(tuple(map(torch.empty_like, given)))
        tape = self.tapes[key]
        for kept, x in zip(tape.inputs, given):
            kept.copy_(x)
        tape.done += 1
        if tape.done <= WARM_UP:
            return self._aside(lambda: step(*tape.inputs))
        for rate, group in zip(self.rates_G, self.optimizer.param_groups):
            rate.fill_(group["lr"])
        if tape.replay is None:
            try:
                tape.replay, tape.outputs = self._recorded(lambda: step(*tape.inputs))
            except RuntimeError as error:
                if self.strict:
                    raise
                self.refused = reason_of(error)
                return step(*given)
        tape.replay()
        return tape.outputs

    def _recorded(self, step: Callable[[], Tensors]) -> Recording:
        """Records a step that reads its learning rates from tensors."""
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates_G):
            group["lr"] = rate
        try:
            return self._record(step)
        finally:
            for group, rate in zip(groups, rates):
                group["lr"] = rate

    def _aside(self, step: Callable[[], Tensors]) -> Tensors:
        """Runs a step on the stream of the later recording: autograd's state belongs to a stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = step()
        here.wait_stream(self.stream)
        return outputs

    def _record(self, step: Callable[[], Tensors]) -> Recording:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        random = torch.cuda.default_generators[here.device_index].get_state()
        try:
            # Only calls of this thread that a recording forbids are errors: other threads pin memory meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                outputs = step()
        except BaseException:
            self._leave_recording(here, random)
            raise
        return graph.replay, outputs

    def _leave_recording(self, here: torch.cuda.Stream, random: Tensor) -> None:
        """Ends what PyTorch leaves open after a recording that failed: its stream, its random numbers, its memory.

        The random numbers go on from the state `random`. As they are left, the next dropout would be an error.
        """
        torch.cuda.set_stream(here)
        fresh = torch.Generator(here.device)
        fresh.set_state(random)
        torch.cuda.default_generators[here.device_index].graphsafe_set_state(fresh)
        with suppress(RuntimeError):  # where PyTorch has ended it itself
            torch._C._cuda_endAllocateToPool(here.device_index, self.pool)
            torch._C._cuda_releasePool(here.device_index, self.pool)

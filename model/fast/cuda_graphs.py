"""A training step as a CUDA graph: recorded once for each size of a batch, and replayed.

A step of these networks is some thousand kernels of a few microseconds each, which Python starts more slowly than the
device runs them; a graph starts all of them at once. Within a recorded step nothing may wait for the device, and what
changes from step to step has to be read from a tensor whose place stays: the batch, and the rates of the optimiser.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.errors import reason_of

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
Recording = tuple[Callable[[], object], Tensors]  # what replays a step, and the tensors that it then fills

WARM_UP = 3  # steps before the one that is recorded, in which libraries choose kernels and optimisers make their state


def recordable(optimizer: Optimizer) -> bool:
    """Whether the optimiser can step within a graph: it counts its steps on the device, and takes a tensor as rate."""
    return bool(optimizer.defaults.get("capturable") or optimizer.defaults.get("fused"))


@dataclass
class _Tape:
    """The steps on batches of one size."""

    inputs: Tensors
    done: int = 0
    replay: Callable[[], object] | None = None
    outputs: Tensors = ()


class Recorder:
    """Takes training steps, the first of each size of a batch as they are, later ones as replays of a graph.

    Where recording fails and `strict` is not set, steps go on as they are, and `refused` says why.
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
        """What `step` returns for these tensors. It must be the same function for all batches of one size.

        The results are overwritten by the next step.
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
        """Records a step that reads its rates from tensors."""
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
        """Takes a step on the stream that is recorded later, as what autograd keeps is bound to a stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = step()
        here.wait_stream(self.stream)
        return outputs

    def _record(self, step: Callable[[], Tensors]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        # Errors of this thread alone: others, which pin memory, may do what a recorded step may not.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = step()
        return graph.replay, outputs

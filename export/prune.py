"""Networks without the experts that their gates hardly use. Pruning CHANGES the function of a network.

Shapes: B images, K experts.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from expertgrid.export.compare import pytorch_logits
from expertgrid.export.to_onnx import as_input
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.gates import gates, recorded
from expertgrid.model.net import ExpertBlock, ExpertNet
from expertgrid.model.system.errors import InputError


def pruned(
    checkpoint: Checkpoint, validation: np.ndarray, labels_B: np.ndarray, threshold: float
) -> tuple[Checkpoint, str]:
    """The checkpoint without experts whose weight is under `threshold` on every validation image, and what it cost.

    `validation` is uint8 images (B, H, W, C). The text names the experts that were dropped, and the validation accuracy
    before and after, in percent. Raises InputError for a network that has no experts.
    """
    before = checkpoint.network()
    if not isinstance(before, ExpertNet):
        raise InputError(f"--prune-gates: {checkpoint.trained.model} has no experts")
    images = as_input(validation, checkpoint, "float")
    after, dropped = prune_gates(before, largest_gate_weights(before, images), threshold)
    accuracies = [100 * (pytorch_logits(net, images).argmax(1) == labels_B).mean() for net in (before, after)]
    return (
        Checkpoint(after.config, checkpoint.trained, after.state_dict()),
        f"pruned {len(dropped)} experts ({', '.join(dropped) or 'none'}): validation accuracy {accuracies[0]:.2f}% "
        f"before, {accuracies[1]:.2f}% after",
    )


def largest_gate_weights(net: ExpertNet, images: np.ndarray) -> dict[str, Tensor]:
    """The largest weight (K,) of each expert over all images, normalised floats (B, C, H, W), by the block's name."""
    with recorded(gates(net)) as weights:
        pytorch_logits(net, images)
    return {block: torch.cat(batches_BK).amax(0) for block, batches_BK in weights.items()}


def prune_gates(net: ExpertNet, gates_max: dict[str, Tensor], threshold: float) -> tuple[ExpertNet, list[str]]:
    """A network without the experts whose gate weight stays under `threshold`: this CHANGES the function.

    `gates_max` has the largest weights (K,) that were seen, by the block's name, for the blocks that are pruned: the
    `largest_gate_weights` of the validation images. The softmax over the experts that are left renormalises
    their weights; where one is left it has no gate, and where none would be the one with the largest weight stays.
    Returns a new network, in the mode of `net` and with the config that describes it, and the names of the experts
    dropped.
    """
    source = copy.deepcopy(net)
    dropped: list[str] = []
    remaining: list[list[int]] = []  # of each block
    for name, block in list(source.named_modules()):
        if isinstance(block, ExpertBlock):
            remaining.append(list(range(len(block.experts))))
            if name in gates_max:
                max_K = gates_max[name]
                stay_K = (max_K >= threshold) | (torch.arange(len(max_K)) == max_K.argmax().cpu()).to(max_K.device)
                dropped += [f"{name}.experts.{k}" for k in remaining[-1] if not stay_K[k]]
                remaining[-1] = stay_K.nonzero().flatten().tolist()
                _keep_experts(block, remaining[-1])
    in_turn = iter(remaining)
    config = net.config.map_blocks(lambda block: block.change(kernels=tuple(block.kernels[k] for k in next(in_turn))))
    with torch.device("meta"):  # no memory, and no numbers drawn
        pruned = ExpertNet(config)
    pruned.load_state_dict(source.state_dict(), assign=True)
    return pruned.train(net.training), dropped


def _keep_experts(block: ExpertBlock, remaining: list[int]) -> None:
    """Leaves these experts in a block with a gate, with the weights of a block that has them only."""
    gate, block.experts = block.gate, nn.ModuleList(block.experts[k] for k in remaining)
    if gate is not None and len(remaining) > 1:
        last = gate if gate.mlp is None else gate.mlp[-1]
        for name, tensor in last.state_dict().items():
            setattr(last, name, nn.Parameter(tensor[remaining]))
        return
    block.gate = None
    if isinstance(block.norm_act, nn.Sequential):  # the norm after one expert is its own
        block.experts[0].norm, block.norm_act = block.norm_act[0], nn.Identity()

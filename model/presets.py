"""Networks as data: the five references and our own. `model.registry` registers them with timm as `expertnet_<name>`.

Each reference comes from a written report on CIFAR-10. `unstated:` marks a choice that its report leaves open and that
is ours. Unstated in all five, and chosen alike: convolutions before a batch norm have no bias, normalisation is batch
norm with PyTorch's defaults, and weights start as `ModelConfig.init` says.
"""

from difflib import get_close_matches

from expertgrid.model.config import (
    Block,
    Conv,
    Dropout,
    GateConfig,
    HeadConfig,
    Layer,
    ModelConfig,
    Network,
    NormConfig,
    Pool,
    Residual,
    TimmModel,
    Whiten,
)
from expertgrid.model.system.errors import unknown


def _of_speed_runs(widths: tuple[int, int, int], kernels: tuple[int, ...], residual: bool = False) -> ModelConfig:
    """Whitening stem and three groups of a pooled conv and an expert block, or a residual macro block of two."""
    layers: list[Layer] = [Whiten()]
    for w in widths:
        block = Block(channels=w, kernels=kernels, norm_act="mix")
        layers += [Conv(channels=w, pool=2), Residual(layers=(block, block)) if residual else block]
    norm, head = NormConfig(momentum=0.4, scale=False), HeadConfig(pool="max", scale=1 / 9)
    return ModelConfig(layers=tuple(layers), norm=norm, init="dirac", head=head)


def _macro(channels: int, kernel: int = 3, stride: int = 1) -> Block:
    return Block(channels=channels, kernels=(kernel, kernel), stride=stride, gate=GateConfig(kind="linear"))


def _mixed(channels: int) -> Block:
    gate = GateConfig(kind="mlp", hidden=(512, 512))
    return Block(channels=channels, kernels=(5, 5, 5, 3, 3, 3), norm_act="mix", gate=gate)


PRESETS: dict[str, ModelConfig] = {
    # Reported: 80.68% after the last epoch, "80 to 85%".
    "two_block": ModelConfig(
        layers=(
            Conv(channels=64),  # unstated: kernel 3, stride 1
            # unstated: an expert is conv 3x3, BN, ReLU; 64 channels and no downsampling throughout
            *[Block(channels=64, kernels=(3,) * 4, gate=GateConfig(kind="mlp", reduction=4))] * 2,
        ),
        head=HeadConfig(dropout=0.2),
    ),
    # Reported: 90.53% after the last epoch, 94 to 254 seconds an epoch.
    "eight_block": ModelConfig(
        layers=(
            Conv(channels=64),  # unstated: kernel 3, stride 1
            # unstated: no downsampling; the gate's branch is FC, ReLU, FC
            *[Block(channels=64, kernels=(3,) * 3, gate=GateConfig(kind="mlp", reduction=8))] * 8,
        ),
    ),
    # Reported: 91.07%.
    "segmented": ModelConfig(
        layers=(
            # unstated: three segments of two blocks; K=3; channels 64, 128, 256; max pooling between the segments
            *(Block(channels=64), Block(channels=64), Pool()),
            *(Block(channels=128), Block(channels=128), Pool()),
            *(Block(channels=256), Block(channels=256)),
        ),
        head=HeadConfig(hidden=(512,), dropout=0.5),  # hidden: twice the features
    ),
    # Reported: 91.7% best, 91.5% when repeated.
    "macro_residual": ModelConfig(
        layers=(
            _macro(64),
            _macro(128, kernel=5, stride=2),
            Residual(layers=(_macro(256), _macro(256))),
            Pool(),
            _macro(384),
            Residual(layers=(_macro(384), _macro(384))),
            Pool(),
            Conv(channels=256, padding=0),
        ),
        head=HeadConfig(hidden=(128,), dropout=0.5),
    ),
    # Reported: 86.35%.
    "mixed_kernel": ModelConfig(
        layers=(
            # unstated: three 5x5 and three 3x3 experts; which blocks have 32, 64 and 128 channels; ReLU after the
            # norm of a block's output, none inside the experts; residuals skip one block, before the pool;
            # dropout of 0.2; global average pooling before the head's MLP, without dropout in it
            _mixed(32),
            _mixed(32),
            *(Pool(op="avg"), Dropout(p=0.2)),
            _mixed(64),
            Residual(layers=(_mixed(64),)),
            *(Pool(), Dropout(p=0.2)),
            _mixed(128),
            Residual(layers=(_mixed(128),)),
            Residual(layers=(_mixed(128),)),
            *(Pool(), Dropout(p=0.2)),
        ),
        head=HeadConfig(hidden=(1024, 512)),
    ),
    # Ours. The form and its parts (whitening stem, identity initialisation, convs pooled before their norm, norms of
    # high momentum without scale, scaled head) are those of cifar10-airbench, 2404.00498; the experts are ours: a 1x1
    # expert beside the 3x3 costs a ninth of a second 3x3, and was as good in short trainings.
    "speed": _of_speed_runs((64, 256, 256), (3, 1)),
    "speed_matched_params": _of_speed_runs((72, 264, 264), (3,)),  # its matched baselines: of equal parameters,
    "speed_matched_macs": _of_speed_runs((64, 264, 264), (3,)),  # and of equal multiply-accumulates
    "accuracy": _of_speed_runs((128, 384, 512), (3, 1), residual=True),
    "accuracy_matched_params": _of_speed_runs((128, 400, 536), (3,), residual=True),
    "accuracy_matched_macs": _of_speed_runs((136, 392, 520), (3,), residual=True),
}


def network(name: str) -> Network:
    """The preset called `name` (with or without timm's prefix `expertnet_`), else timm's model of that name.

    Raises InputError where neither has it.
    """
    ours = name.removeprefix("expertnet_")
    if ours in PRESETS:
        return PRESETS[ours]
    import timm  # only for names that are no preset: it imports torch

    if timm.is_model(name):
        return TimmModel(timm=name)
    names = [*PRESETS, *get_close_matches(name, timm.list_models(), n=1)]
    raise unknown("model", name, names, ", or the name of a timm model; --import MODULE registers networks")

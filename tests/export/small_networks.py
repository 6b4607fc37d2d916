"""Small networks and their exported files, each exported once for all tests that use it."""

from functools import cache

import numpy as np
import onnx
import torch

from expertgrid.export.to_onnx import to_onnx
from expertgrid.model.checkpoint import Checkpoint, Trained
from expertgrid.model.config import Block, Conv, ModelConfig
from expertgrid.model.registry import build

CLASSES = ("a cat", "b_dog*", "<c> | `d`")
HEIGHT, WIDTH = 6, 8


def trained(**fields) -> Trained:
    """What a network of three classes was trained on, with other fields where they are given."""
    return Trained(**{
        "trial": "abc", "model": "two_block", "data": "my_data", "fingerprint": "0123abcd", "classes": CLASSES,
        "image_size": (HEIGHT, WIDTH), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
    } | fields)  # fmt: skip


@cache
def small_checkpoint(channels: int) -> Checkpoint:
    """A network with fresh weights that tells three classes of 6x8 images apart."""
    torch.manual_seed(0)
    config = ModelConfig(in_chans=channels, num_classes=3, layers=(Conv(channels=4), Block(channels=6)))
    about = trained(mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.4)[:channels])
    return Checkpoint(config, about, build(config).state_dict())


@cache
def small_model(channels: int, kind: str) -> bytes:
    """Its ONNX file. Tests must not change it, and cannot."""
    return to_onnx(small_checkpoint(channels), kind)


def with_weights(model: bytes, **values: np.ndarray) -> bytes:
    """A model with other initializers: each replaces the one whose name ends in the key, `__` for a dot."""
    proto = onnx.load_from_string(model)
    for key, value in values.items():
        old = next(held for held in proto.graph.initializer if held.name.endswith(key.replace("__", ".")))
        old.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), old.name))
    return proto.SerializeToString()


def weights(model: bytes, ends: str) -> np.ndarray:
    """The values of the initializer whose name ends so."""
    initializers = onnx.load_from_string(model).graph.initializer
    return next(onnx.numpy_helper.to_array(held).copy() for held in initializers if held.name.endswith(ends))

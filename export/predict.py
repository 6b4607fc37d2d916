"""Predictions of an exported network for image files of any size and mode.

Shapes: B images, H x W pixels, C channels, N classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from pydantic import BaseModel, TypeAdapter, ValidationError

from export.session import open_session
from model.errors import InputError

BATCH = 64
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
KEYS = ("expertgrid.input", "classes", "mean", "std", "image_size")


class Prediction(BaseModel):
    """What the network makes of one image."""

    path: Path
    classes: list[tuple[str, float]]  # each class with its softmax probability, the most probable first


class _Needs(BaseModel):
    """What the network wants its pixels to be, and what its outputs are called."""

    is_uint8: bool
    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


def predict(model: bytes, name: str, images: Sequence[Path], provider: str = "cpu") -> list[Prediction]:
    """Classifies image files with an ONNX model that `to_onnx` made; one prediction for each, in their order.

    `name` is what errors call the model. Raises InputError for a model without expertgrid's metadata, for a provider
    that is not there, and for a file that is missing or is no image.
    """
    session = open_session(model, provider, name)
    needs = _needs(session, name)
    predictions = []
    for i in range(0, len(images), BATCH):
        paths = images[i : i + BATCH]
        pixels_BHWC = np.stack([read_pixels(path, needs.height, needs.width, needs.channels) for path in paths])
        given = pixels_BHWC if needs.is_uint8 else _normalised(pixels_BHWC, needs)
        (logits_BN,) = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: given})
        if logits_BN.shape != (len(paths), len(needs.classes)):
            raise InputError(
                f"{name}: its output is {logits_BN.shape[1:]}, its metadata has {len(needs.classes)} classes"
            )
        for path, probabilities_N in zip(paths, softmax(logits_BN)):
            order = np.argsort(-probabilities_N, kind="stable")
            ranked = [(needs.classes[n], float(probabilities_N[n])) for n in order]
            predictions.append(Prediction(path=path, classes=ranked))
    return predictions


def read_pixels(path: Path, height: int, width: int, channels: int) -> np.ndarray:
    """The image in a file as (H, W, C) uint8, upright as its EXIF data says and with transparency left out.

    An image of another size is scaled until it covers the wanted one, antialiased, and what stands over is cut off
    evenly on both sides. Of an animation it is the first picture. Raises InputError for a file that is missing or is
    no image.
    """
    try:
        with Image.open(path) as image:
            upright = _convertible(ImageOps.exif_transpose(image), path).convert(MODES[channels])
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not an image, or of a format that Pillow does not read") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow does not read"
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None
    if upright.size != (width, height):
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(upright).reshape(height, width, channels)


def _convertible(image: Image.Image, path: Path) -> Image.Image:
    """The image in a mode that Pillow converts to grey and to RGB: 16 bits of grey become 8, and LAB becomes RGB."""
    if image.mode == "LAB":
        return image.convert("RGB")
    if image.mode == "F":
        raise InputError(f"{path}: its pixels are floats, of which the file does not say what is white")
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image, dtype=np.int64)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise InputError(f"{path}: its pixels go from {values_HW.min()} to {values_HW.max()}; 16 bits are 0 to 65535")
    return Image.fromarray((values_HW / 257).round().astype(np.uint8))


def softmax(logits_BN: np.ndarray) -> np.ndarray:
    """Each row as probabilities (B, N), in float64."""
    powers_BN = np.exp(logits_BN.astype(np.float64) - logits_BN.max(1, keepdims=True))
    return powers_BN / powers_BN.sum(1, keepdims=True)


def _normalised(pixels_BHWC: np.ndarray, needs: _Needs) -> np.ndarray:
    """(B, H, W, C) uint8 to (B, C, H, W) float32, in the arithmetic of `to_onnx.PixelNet`."""
    x_BHWC = pixels_BHWC.astype(np.float32) / np.float32(255)
    x_BHWC = (x_BHWC - np.float32(needs.mean)) / np.float32(needs.std)
    return np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2))


def _needs(session: onnxruntime.InferenceSession, name: str) -> _Needs:
    metadata = session.get_modelmeta().custom_metadata_map
    missing = [key for key in KEYS if key not in metadata]
    if missing:
        raise InputError(
            f"{name}: its metadata has no {missing[0]!r}; predictions need a model that expertgrid exported"
        )
    kind, given = metadata["expertgrid.input"], session.get_inputs()
    if kind not in ("uint8", "float") or len(given) != 1 or len(given[0].shape) != 4:
        found = ", ".join(f"{one.name}: {one.type} {one.shape}" for one in given)
        raise InputError(
            f"{name}: needs one input of images, uint8 or float; its metadata says {kind!r}, found {found}"
        )
    channels = given[0].shape[3 if kind == "uint8" else 1]
    if channels not in MODES:
        raise InputError(f"{name}: takes images of {channels} channels; image files are read as grey (1) or RGB (3)")
    try:
        size = TypeAdapter(tuple[int, int]).validate_json(metadata["image_size"])
        fields = {key: json.loads(metadata[key]) for key in ("mean", "std", "classes")}
        return _Needs(is_uint8=kind == "uint8", height=size[0], width=size[1], channels=channels, **fields)
    except (json.JSONDecodeError, ValidationError):
        raise InputError(
            f"{name}: its metadata is damaged: {', '.join(KEYS[1:])} are not what expertgrid writes"
        ) from None

"""Predictions of an exported network for image files of any size and mode, without torch where a CPU runs it.

Shapes: B images, H x W pixels, C channels, N classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from pydantic import BaseModel

from expertgrid.export.metadata import AS_IT_IS, INPUT, LOGITS, Metadata, read_metadata
from expertgrid.export.session import open_any, open_session, run
from expertgrid.model.pixels import FORMATS, TooManyPixels, fitted, normalised, opened
from expertgrid.model.system.errors import InputError, wrong_file
from expertgrid.model.system.files import read_whole

BATCH = 64
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


class Prediction(BaseModel):
    """What the network makes of one image."""

    path: Path
    classes: list[tuple[str, float]]  # each class with its softmax probability, the most probable first


def predict(model: bytes, name: str, images: Sequence[Path], provider: str | None = None) -> list[Prediction]:
    """Classifies image files with an ONNX model that `to_onnx` made; one prediction for each, in their order.

    `name` is what errors call the model; without `provider`, that which the file names runs it. Raises InputError for a
    model without expertgrid's metadata, a provider that is not there, and a file that is missing or not an image.
    """
    graph = open_session(model, "cpu", name)
    metadata = read_metadata(graph.get_modelmeta().custom_metadata_map, name)
    channels = _channels(graph, metadata, name)
    provider = provider or metadata.provider
    options = metadata.options_on(provider)
    is_open = provider == "cpu" and options == AS_IT_IS
    session = graph if is_open else open_any(model, provider, name, metadata.precision, options=options)
    trained, predictions = metadata.trained, []
    for i in range(0, len(images), BATCH):
        paths = images[i : i + BATCH]
        pixels_BHWC = np.stack([read_pixels(path, *trained.image_size, channels) for path in paths])
        batch = pixels_BHWC if metadata.input == "uint8" else normalised(pixels_BHWC, trained)
        (logits_BN,) = run(session, [LOGITS], {INPUT: batch})
        if logits_BN.shape != (len(paths), len(trained.classes)):
            raise InputError(
                f"{name}: its output is {logits_BN.shape[1:]}, its metadata has {len(trained.classes)} classes"
            )
        odds_BN = np.exp(logits_BN.astype(np.float64) - logits_BN.max(1, keepdims=True))  # scipy's takes long to import
        for path, probabilities_N in zip(paths, odds_BN / odds_BN.sum(1, keepdims=True)):
            order = np.argsort(-probabilities_N, kind="stable")
            ranked = [(trained.classes[n], float(probabilities_N[n])) for n in order]
            predictions.append(Prediction(path=path, classes=ranked))
    return predictions


def _channels(session: onnxruntime.InferenceSession, metadata: Metadata, name: str) -> int:
    """The channels of the images that the session takes. Raises InputError where they are not grey or RGB images."""
    inputs = session.get_inputs()
    if [value.name for value in inputs] != [INPUT] or len(inputs[0].shape) != 4:
        types = ", ".join(f"{value.name}: {value.type} {value.shape}" for value in inputs)
        raise InputError(f"{name}: needs one input {INPUT!r} of images, of {metadata.input}; found {types}")
    channels = inputs[0].shape[3 if metadata.input == "uint8" else 1]
    if channels not in MODES:
        raise InputError(f"{name}: takes images of {channels} channels; image files are read as grey (1) or RGB (3)")
    return channels


def read_pixels(path: Path, height: int, width: int, channels: int) -> np.ndarray:
    """The image in a file as (H, W, C) uint8, upright as its EXIF data says, without transparency.

    An image of another size is resized and cropped as in evaluation: `model.pixels.fitted`. Of an animation it is the
    first picture. Raises InputError for a file that is missing or not an image.
    """
    try:
        with opened(read_whole(path)) as image:
            upright = _convertible(ImageOps.exif_transpose(image), path).convert(MODES[channels])
    except Image.UnidentifiedImageError:
        raise wrong_file(path, f"not an image, or of another format than {', '.join(FORMATS)}") from None
    except TooManyPixels as error:
        raise wrong_file(path, error) from None
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise wrong_file(path, f"cannot be read as an image ({reason})") from None
    return np.asarray(fitted(upright, height, width)).reshape(height, width, channels)


def _convertible(image: Image.Image, path: Path) -> Image.Image:
    """The image in a mode that Pillow converts to grey and to RGB: 16 bits of grey become 8, and LAB becomes RGB."""
    if image.mode == "LAB":
        return image.convert("RGB")
    if image.mode == "F":
        raise wrong_file(path, "its pixels are floats, of which the file does not say what is white")
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image)
    if values_HW.min() < 0 or values_HW.max() > 65535:
        raise wrong_file(path, f"its pixels go from {values_HW.min()} to {values_HW.max()}; 16 bits are 0 to 65535")
    return Image.fromarray(((values_HW.astype(np.int32) + 128) // 257).astype(np.uint8))  # rounded

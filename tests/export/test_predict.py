"""Predictions: PyTorch's on the same pixels, from image files of any size and mode."""

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from small_networks import CLASSES, HEIGHT, WIDTH, small_checkpoint, small_model

from expertgrid.export.metadata import with_entries
from expertgrid.export.predict import BATCH, predict, read_pixels
from expertgrid.export.to_onnx import served
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.pixels import fitted, normalise, normalised
from expertgrid.model.system.errors import InputError


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "rgb"])
def checkpoint(request) -> Checkpoint:
    return small_checkpoint(request.param)


@pytest.fixture(scope="module", params=["uint8", "float"])
def model(request, checkpoint) -> bytes:
    return small_model(checkpoint.config.in_chans, request.param)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def pytorch(checkpoint: Checkpoint, pixels_BHWC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return served(checkpoint, "uint8")(torch.from_numpy(pixels_BHWC)).softmax(1).numpy()


def probabilities(prediction) -> list[float]:
    return [dict(prediction.classes)[name] for name in CLASSES]


def test_pytorch_agrees_on_images_of_the_right_size(checkpoint, model, tmp_path):
    channels = checkpoint.config.in_chans
    pixels_BHWC = noise(BATCH + 3, HEIGHT, WIDTH, channels)
    paths = [tmp_path / f"{i}.png" for i in range(len(pixels_BHWC))]
    for path, pixels in zip(paths, pixels_BHWC):
        Image.fromarray(pixels.squeeze()).save(path)
    found = predict(model, "model.onnx", paths)
    assert [prediction.path for prediction in found] == paths
    expected_BN = pytorch(checkpoint, pixels_BHWC)
    np.testing.assert_allclose([probabilities(p) for p in found], expected_BN, rtol=1e-4, atol=1e-5)
    for prediction, expected_N in zip(found, expected_BN):
        chances = [chance for _, chance in prediction.classes]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1)
        assert prediction.classes[0][0] == CLASSES[expected_N.argmax()]
    np.testing.assert_array_equal(read_pixels(paths[0], HEIGHT, WIDTH, channels), pixels_BHWC[0])


def test_normalised_images_are_those_of_pytorch_to_the_last_bit():
    trained = small_checkpoint(3).trained
    pixels_BHWC = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels_BCHW, moments = (
        torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2),
        map(torch.tensor, (trained.mean, trained.std)),
    )
    np.testing.assert_array_equal(normalised(pixels_BHWC, trained), normalise(pixels_BCHW, *moments).numpy())


def test_any_size_goes_through_the_network(checkpoint, model, tmp_path):
    sizes = [(1, 1), (3, 200), (200, 3), (64, 48), (9, 7), (WIDTH, HEIGHT)]
    paths = [tmp_path / f"{width}x{height}.png" for width, height in sizes]
    channels, pixels = checkpoint.config.in_chans, []
    for path, (width, height) in zip(paths, sizes):
        image = Image.fromarray(noise(height, width, 3))
        image.save(path)
        image = fitted(image.convert({1: "L", 3: "RGB"}[channels]), HEIGHT, WIDTH)
        pixels.append(np.asarray(image).reshape(HEIGHT, WIDTH, channels))
    probabilities_BN = [probabilities(prediction) for prediction in predict(model, "model.onnx", paths)]
    np.testing.assert_allclose(probabilities_BN, pytorch(checkpoint, np.stack(pixels)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["L.png", "LA.png", "P.png", "P.gif", "RGB.png", "RGBA.png", "RGB.bmp", "CMYK.tiff", "I;16.png", "I.tiff"]
)
def test_modes(mode, channels, tmp_path):
    """A picture in greys is the same in each mode."""
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 5
    image = Image.fromarray(grey)
    mode, suffix = mode.split(".")
    if mode.startswith("I"):
        image = Image.fromarray((grey * 257.0).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "P":
        image = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)
    else:
        image = image.convert("RGB").convert(mode)
    assert image.mode == mode
    image.save(tmp_path / f"image.{suffix}")
    pixels = read_pixels(tmp_path / f"image.{suffix}", HEIGHT, WIDTH, channels)
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], channels, 2))


@pytest.mark.parametrize(("mode", "white", "suffix"), [("1", 1, "png"), ("LAB", (255, 128, 128), "tiff")])
def test_white(mode, white, suffix, tmp_path):
    Image.new(mode, (WIDTH, HEIGHT), white).save(tmp_path / f"white.{suffix}")
    for channels in (1, 3):
        assert (read_pixels(tmp_path / f"white.{suffix}", HEIGHT, WIDTH, channels) >= 254).all()


def test_exif_turns_the_image(tmp_path):
    pixels = noise(WIDTH, HEIGHT, 3)  # lying on its side
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_pixels(tmp_path / "image.png", HEIGHT, WIDTH, 3), np.rot90(pixels, -1))


@pytest.fixture(scope="module")
def rgb() -> bytes:
    return small_model(3, "uint8")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "fine.png")
    return tmp_path / "fine.png"


def test_files_that_are_no_images(rgb, picture, tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    Image.fromarray(noise(50, 50, 3)).save(tmp_path / "whole.png")
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    floats, wide = tmp_path / "floats.tiff", tmp_path / "wide.tiff"
    Image.fromarray(np.ones((4, 4), np.float32)).save(floats)
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(wide)
    cases = {
        text: "text.png: not an image", cut: "cut.png: cannot be read as an image", floats: "its pixels are floats",
        wide: "its pixels go from 70000 to 70000", tmp_path / "none.png": "none.png: cannot be read: No such file",
        tmp_path: "cannot be read: not a regular file",
    }  # fmt: skip
    assert predict(rgb, "model.onnx", []) == []
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            predict(rgb, "model.onnx", [picture, path])
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_images_that_are_too_large(rgb, picture, monkeypatch):
    monkeypatch.setattr("expertgrid.model.pixels.LARGEST_IMAGE", 10)
    with pytest.raises(InputError, match="fine.png: 8 x 6 are more than 10 pixels, which is the limit"):
        predict(rgb, "model.onnx", [picture])


def test_models_that_are_not_ours(rgb, picture):
    fewer = with_entries(rgb, {"classes": '["a", "b"]'})
    with pytest.raises(InputError, match="other.onnx: its output is .3,., its metadata has 2 classes"):
        predict(fewer, "other.onnx", [picture])
    with pytest.raises(InputError, match="other.onnx: takes images of 6 channels"):
        predict(with_entries(rgb, {"expertgrid.input": "float"}), "other.onnx", [picture])
    foreign = onnx.load_from_string(rgb)
    del foreign.metadata_props[:]
    with pytest.raises(InputError, match="other.onnx: its metadata has no 'expertgrid.input'"):
        predict(foreign.SerializeToString(), "other.onnx", [picture])

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from expertgrid.bench.baseline import Baseline, BaselineImages
from expertgrid.bench.timm_script import timm_script
from expertgrid.model.config import TimmModel
from expertgrid.model.system.errors import InputError

# Logs steps as timm's train.py does, as often as there are images for them.
SCRIPT = """
import sys, time
from pathlib import Path

words = sys.argv
Path(__file__).with_name("words").write_text(" ".join(words))
files = list(Path(words[words.index("--data-dir") + 1]).glob("train/*/*.png"))
print("Training starts", file=sys.stderr, flush=True)
Path(__file__).with_name("8.png").write_bytes({file.name: file.read_bytes() for file in files}["8.png"])
for step in range(len(files) // 4):
    time.sleep(0.05)
    Path(__file__).with_name("step").write_text(str(step))
    print(f"Train: 0 [{step}/9]", file=sys.stderr, flush=True)
raise ValueError("no more images")
"""
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))


def baseline(**changes) -> Baseline:
    images = BaselineImages(PIXELS, torch.arange(8) % 3, lambda image: image)
    return Baseline(nn.Identity(), lambda net: None, images, 4, 2, 0.2, torch.device("cpu"), **changes)


def test_the_script_goes_on_in_its_rounds_alone(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    with timm_script(tmp_path, TimmModel(timm="resnet10t"), baseline(), 3) as take_round:
        for _ in range(3):
            time.sleep(0.2)
            step = (tmp_path / "step").read_text()
            time.sleep(0.3)
            assert (tmp_path / "step").read_text() == step
            assert take_round() > 0
        with pytest.raises(InputError, match=r"--peer: train\.py ended: ValueError: no more images"):
            for _ in range(3):
                take_round()


@pytest.mark.parametrize(("compiled", "bfloat16"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_script_trains_as_the_baseline_does(tmp_path, compiled, bfloat16):
    (tmp_path / "train.py").write_text(SCRIPT)
    network = TimmModel(timm="resnet10t", arguments={"stem_type": "deep"})
    with timm_script(tmp_path, network, baseline(compiled=compiled, bfloat16=bfloat16), 1) as once:
        once()
    words = (tmp_path / "words").read_text()
    assert "--device cpu --model resnet10t --num-classes 10 --input-size 3 32 32 --batch-size 4" in words
    assert "--model-kwargs stem_type='deep' --workers" in words
    assert ("--torchcompile" in words, "--amp --amp-dtype bfloat16" in words) == (compiled, bfloat16)
    assert ("--channels-last" in words) == (compiled or bfloat16)
    assert (np.asarray(Image.open(tmp_path / "8.png")) == PIXELS[0].numpy()).all()


def test_what_is_not_timms_is_one_line(expertgrid, tmp_path):
    def complaint(network: str) -> str:
        outcome = expertgrid("bench-train", network, "--peer", tmp_path, "--device", "cpu")
        return outcome.complaint * (outcome.status == 2)

    assert "has no train.py: it is to be a check-out of timm's repository" in complaint("resnet10t")
    (tmp_path / "train.py").write_text(SCRIPT)
    assert "timm's train.py has the networks of timm alone" in complaint("two_block")
    assert expertgrid("bench-train", "resnet10t", "--peer", tmp_path, "--profile").status == 2

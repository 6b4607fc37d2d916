"""Repeated verdicts: the slower file computes the same, and each verdict is counted."""

import json

import numpy as np

from bench import repeats
from bench.latency import random_images
from bench.repeats import SAME, SLOWER, Repeat, RepeatsRecord
from bench.timing import Ratio
from bench.untrained import untrained_checkpoint
from export.session import open_session
from export.to_onnx import to_onnx
from model.presets import PRESETS
from model.variants import vary

SMALL = vary(PRESETS["two_block"], "width", 0.0625)


def test_the_slower_file_computes_the_same_and_more():
    model = to_onnx(untrained_checkpoint("two_block", SMALL), "uint8")
    images = random_images(model, 3)
    slower = repeats.with_matmul(model, 40)
    plain, more = (open_session(made, "cpu", "model").run(None, {"images": images})[0] for made in (model, slower))
    np.testing.assert_allclose(more, plain, atol=1e-6)
    assert len(slower) > len(model) + 40 * 32 * 32 * 3 * 4


def test_command_counts_the_verdicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(repeats, "network", lambda name: SMALL)
    arguments = ["two_block", "--repeats", "2", "--seconds", "0.02", "--openings", "2"]
    assert repeats.main([*arguments, "--out", str(tmp_path / "record.json")]) == 0
    record = RepeatsRecord.model_validate(json.loads((tmp_path / "record.json").read_text()))
    assert [repeat.other for repeat in record.repeats] == [SAME, SLOWER] * 2
    out = capsys.readouterr().out
    assert "the same file" in out
    assert record.columns > 0
    words = {"faster": Ratio(2, 1.5, 3), "slower": Ratio(0.5, 0.4, 0.6), "can't tell": Ratio(1, 0.9, 1.1)}
    told = [
        Repeat(other=other, ratio=words[word], word=word, seconds=3)
        for other, word in ((SAME, "can't tell"), (SAME, "faster"), (SLOWER, "slower"), (SLOWER, "can't tell"))
    ]
    same, slower = repeats.rows(record.model_copy(update={"repeats": told}))
    assert (same["faster"], same["can't tell"], same["slower"], same["right"]) == (1, 1, 0, "1 of 2")
    assert (slower["faster"], slower["can't tell"], slower["slower"], slower["right"]) == (0, 1, 1, "1 of 2")
    assert same["mean ratio"] == "1.4142"


def test_preset_that_does_not_exist(capsys):
    assert repeats.main(["three_block"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown")

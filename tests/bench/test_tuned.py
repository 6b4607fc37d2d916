"""Timing tuned files beside PyTorch: what is timed, and what is written."""

import json

from bench import tune, tuned
from model.presets import PRESETS
from model.variants import vary


def test_command_prints_and_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuned, "network", lambda name: vary(PRESETS[name], "width", 0.0625))
    monkeypatch.setattr(tune, "EFFORT", (0.01, 2))
    monkeypatch.setattr(tune, "REWRITE_SETS", {"none": ()})
    monkeypatch.setitem(tune.ENGINES, "cpu", (("cpu", "fp32"),))
    monkeypatch.setattr(tuned, "COMPILED", "eager-bf16")  # a compiler takes long
    monkeypatch.setattr(tuned, "IMAGES", 8)
    arguments = ["two_block", "--batch", "2", "--seconds", "0.02", "--openings", "2"]
    assert tuned.main([*arguments, "--out", str(tmp_path / "record.json")]) == 0
    printed = capsys.readouterr()
    assert "a / b: how many times as fast a is as b." in printed.out
    assert "network two_block, batch 2, tuned ms " in printed.err
    (found,) = tuned.TunedRecord.model_validate(json.loads((tmp_path / "record.json").read_text())).found
    assert (found.batch, found.chosen.outcome, found.chosen.batch) == (2, "chosen", 2)
    assert found.ms.keys() == {"tuned", "untuned", "eager", "eager-bf16"}
    assert found.over_eager["tuned"].value > 1 and found.ms["eager"] > found.ms["tuned"]
    assert found.over_compiled.low <= found.over_compiled.value <= found.over_compiled.high


def test_preset_that_does_not_exist(capsys):
    assert tuned.main(["three_block"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown")

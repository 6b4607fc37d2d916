"""Timing the rewrites of the presets: what is timed, and what is written."""

import json

import numpy as np
import pytest

from bench import rewrites
from export.publish import REWRITE_SETS
from export.session import open_session
from model.presets import PRESETS
from model.variants import vary


@pytest.fixture(scope="module")
def models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrites, "network", lambda name: vary(PRESETS[name], "width", 0.0625))
        return rewrites.graphs("two_block")


def test_each_set_is_timed_once_and_sets_of_one_graph_together(models):
    """Experts with norms of their own cannot be one kernel."""
    assert sorted(name for names in models for name in names) == sorted(REWRITE_SETS)
    assert ("folded", "kernels") in models
    images = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    logits = [open_session(model, "cpu", "model").run(None, {"images": images})[0] for model in models.values()]
    for logits_BN in logits[1:]:
        np.testing.assert_allclose(logits_BN, logits[0], atol=1e-5)


def test_command_prints_and_keeps_what_it_measured(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rewrites, "graphs", lambda preset: models)
    arguments = ["two_block", "--batch", "1", "--batch", "2", "--seconds", "0.02", "--openings", "2"]
    assert rewrites.main([*arguments, "--out", str(tmp_path / "record.json")]) == 0
    out = capsys.readouterr().out
    assert "How many times as fast as the graph as it was trained." in out
    record = rewrites.RewritesRecord.model_validate(json.loads((tmp_path / "record.json").read_text()))
    plain = [found for found in record.found if "none" in found.rewrites]
    assert [(found.batch, found.ratio.value) for found in plain] == [(1, 1.0), (2, 1.0)]
    assert all(found.ratio.low <= found.ratio.value <= found.ratio.high for found in record.found)
    assert {"cpu", "instructions", "cores"} == record.machine.keys()


def test_preset_that_does_not_exist(capsys):
    assert rewrites.main(["three_block"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown")

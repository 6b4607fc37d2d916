"""Latency as a pytest-benchmark suite: `pytest bench --benchmark-autosave`, later `--benchmark-compare`."""

import pytest

from bench.latency import random_images


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_latency(benchmark, onnx_model, runs, engine, batch):
    names = [name for name in runs if name.startswith(engine)]
    if not names:
        pytest.skip("the file does not say which network it is, so PyTorch cannot run it")
    images = random_images(onnx_model, batch)
    benchmark.group = f"batch {batch}"
    benchmark.extra_info["engine"] = names[0]
    logits_BN = benchmark.pedantic(runs[names[0]], args=(images,), rounds=30, warmup_rounds=5)
    benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median if benchmark.enabled else None
    assert len(logits_BN) == batch

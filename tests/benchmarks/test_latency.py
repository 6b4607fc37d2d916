"""Latency as a pytest-benchmark suite: `pytest tests/benchmarks --benchmark-autosave`, later `--benchmark-compare`."""

import hashlib

import numpy as np
import onnxruntime
import pytest
import torch

from expertgrid.bench.latency import machine, random_images
from expertgrid.bench.record import PERCENTILES
from expertgrid.bench.timing import Timer, calls_needed

SECONDS = 0.5  # of calls, where their percentiles do not need more


@pytest.mark.parametrize("engine", ["own", "pytorch"])
def test_latency(benchmark, file, onnx_model, opened, engine, batch, pytestconfig):
    engines, metadata = opened
    names = [title for title, way in engines.items() if (way.kind == "eager") == (engine == "pytorch")]
    if not names:
        pytest.skip("the file does not say which network it is, so PyTorch cannot run it")
    images, run = random_images(onnx_model, batch), engines[names[0]]()
    call_s = max(Timer(lambda: run(images)).timed(3)[1:]) / 1000
    rounds = max(calls_needed(90), min(calls_needed(99), round(SECONDS / call_s)))
    benchmark.group = f"batch {batch}"
    benchmark.extra_info |= {
        "engine": names[0],
        "batch": batch,
        "file": file.name if file else "",
        "sha256": hashlib.sha256(onnx_model).hexdigest(),
        "trial": metadata.trained.trial if metadata else "",
        "model": metadata.trained.model if metadata else "",
        "precision": metadata.precision if metadata else "",
        "provider": pytestconfig.getoption("provider"),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    }
    logits_BN = benchmark.pedantic(run, args=(images,), rounds=rounds, warmup_rounds=5)
    assert len(logits_BN) == batch
    if benchmark.enabled:
        calls_ms = 1000 * np.array(benchmark.stats.stats.data)
        benchmark.extra_info["images_per_s"] = 1000 * batch / float(np.median(calls_ms))
        for percentile in PERCENTILES:  # None where there are too few calls for it
            enough = len(calls_ms) >= calls_needed(percentile)
            benchmark.extra_info[f"p{percentile}_ms"] = float(np.percentile(calls_ms, percentile)) if enough else None

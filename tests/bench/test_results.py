"""The page of what was measured on a GPU: its numbers are those of the records beside it."""

import json
from statistics import mean, median

from conftest import REPOSITORY

from expertgrid.model.system.text import render

RESULTS = REPOSITORY / "bench" / "results"


def values(piece: str) -> dict[str, dict]:
    """What the steps of a piece of the measurement gave, by their names."""
    record = json.loads((RESULTS / "nvidia-h200-2026-11-27" / f"{piece}.json").read_text())
    return {name: step["value"] for name, step in record["steps"].items()}


def test_the_numbers_of_the_page_are_those_of_the_records():
    train_speed, check = values("train-speed"), values("check")
    profiles = {name: value for name, value in train_speed.items() if "step_ms" in value}
    steps = [
        {"network": value["model"], "step": value["means"], "ms": round(median(value["step_ms"]), 2),
         "of them in kernels": round(value["busy_ms"], 2), "kernels": round(value["launches"])}
        for value in sorted(profiles.values(), key=lambda value: value["model"])
    ]  # fmt: skip
    kernels = [
        {"longest kernels of eight_block": kernel["name"][:40], "us a step": round(kernel["us"]),
         "share %": round(100 * kernel["share"], 1)}
        for kernel in profiles["step-eight_block-kernels"]["kernels"][:5]
    ]  # fmt: skip
    speeds = [
        {"training": value["model"], "images/s": round(value["images_per_s"]),
         "PyTorch baseline": round(value["baseline_images_per_s"]), "x baseline": round(value["ratio"], 2),
         "of the bf16 peak %": round(100 * value["peak_share"], 1)}
        for value in train_speed.values() if "ratio" in value
    ]  # fmt: skip
    accuracies = []
    for name in ("speed-5", "accuracy-5"):
        (cell,) = values("fast")[name]["cells"]
        accuracies.append({"training": cell["model"], "n": len(cell["records"])})
        for title, field, unit in (
            ("val acc %", "validation_accuracy", 100), ("test acc %", "test_accuracy", 100), ("s", "train_seconds", 1)
        ):  # fmt: skip
            accuracies[-1][title] = round(unit * mean(record[field] for record in cell["records"]), 1)
    page = (RESULTS / "README.md").read_text()
    for table in (steps, kernels, speeds, accuracies):
        assert render(table, "github") in page
    words = " ".join(page.split())
    for precision in ("fp32", "tf32", "bf16"):
        parts = check[f"kernels-{precision}"]["parts"].values()
        assert f"{max(part['kernels'] for part in parts):.1e} in {precision}" in words
    for name in ("graphs", "step-eight_block"):
        assert f"{check[name]['largest']:.1e}" in words
    for choice in ("channels-last", "fused-optimiser", "tile"):
        ours, other = check[f"choice-{choice}"]["ms"].values()
        assert f"{ours:.2f} against {other:.2f} ms" in words
    peaks = values("peaks")["peaks"]
    for field, unit, text in (("bf16_flops", 1e12, "TFLOP/s"), ("copy_bytes_per_s", 1e12, "TB/s")):
        assert f"{max(peak[field] for peak in peaks) / unit:.2f} {text}" in words
    floor = profiles["step-eight_block-kernels"]["floor"]
    assert f"{floor['flops'] / 1e9:.0f} GFLOP and {floor['bytes'] / 1e9:.2f} GB" in words

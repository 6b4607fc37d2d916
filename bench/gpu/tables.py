"""The results of `bench.gpu` as Markdown tables and a picture.

Reads the pieces' files only; every number that is shown is in them or follows from them.
"""

import io
import json
import os
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from bench.gpu.pieces import read_piece
from model.errors import InputError
from model.fast.execution import ExecutionPlan
from model.files import write_whole

MARKERS = "<!-- bench.gpu -->", "<!-- /bench.gpu -->"
PICTURE = "summary.svg"
KERNELS = 8  # the number of kernels that are shown

Results = dict[str, dict[str, Any]]  # the pieces' files by name
Rows = list[dict[str, object]]


def read(directory: Path) -> Results:
    """The pieces' files. Raises InputError for a damaged file."""
    pieces = {file.stem: read_piece(file) for file in sorted(directory.glob("*.json"))}
    return {name: piece.model_dump() for name, piece in pieces.items() if piece}


def newest(out: Path) -> Path | None:
    """The directory in `out` that has the latest results."""
    found = [file for file in out.glob("*/*.json") if file.parent.name[-10:].count("-") == 2]
    return max(found, key=lambda file: (file.parent.name[-10:], file.stat().st_mtime)).parent if found else None


def values(results: Results, piece: str) -> dict[str, Any]:
    """What the steps of a piece measured, by step."""
    return {step: measured["value"] for step, measured in results.get(piece, {"steps": {}})["steps"].items()}


def mean_of(cell: dict[str, Any], field: str, scale: float = 1.0) -> tuple[float, float | None] | None:
    """Mean over a cell's records and half of its 95% t interval; None where no record has the field."""
    found = [scale * record[field] for record in cell["records"] if record.get(field) is not None]
    if not found:
        return None
    if len(found) == 1:
        return found[0], None
    half = stats.t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return statistics.mean(found), float(half)


def interval(found: tuple[float, float | None] | None, sign: str = "") -> str:
    """A mean as text with its interval; seeds that all agree have no interval."""
    if found is None:
        return ""
    return f"{found[0]:{sign}.2f}" + (f" ± {found[1]:.2f}" if found[1] else "")


def check_rows(results: Results) -> Rows:
    """What the check compared and timed, and what failed or was left out, in any piece."""
    rows: Rows = []
    for step, value in values(results, "check").items():
        if "parts" in value:
            largest = max(part["kernels"] for part in value["parts"].values())
            rows.append({"check": step, "found": f"right: {largest:.1e} off at most, as shares of the values"})
        elif "largest" in value:
            rows.append({"check": step, "found": f"right: losses differ by {value['largest']:.1e} at most"})
        elif "ms" in value:
            ways = ", ".join(f"{name}: {ms:.3f} ms" for name, ms in value["ms"].items())
            rows.append({"check": step, "found": f"{ways} a step"})
    for piece, found in results.items():
        rows += [{"check": f"{piece}: {step}", "found": f"failed: {why}"} for step, why in found["failed"].items()]
        rows += [{"check": f"{piece}: {step}", "found": f"left out: {why}"} for step, why in found["left_out"].items()]
    return rows


def epoch_rows(results: Results) -> Rows:
    """The second epoch of each reference: the first records graphs."""
    cells = values(results, "references").get("speed", {"cells": []})["cells"]
    return [
        {
            "network": cell["model"],
            "images/s": f"{record['images_per_s']:,.0f}",
            "steps": str(ExecutionPlan(record["kernels"], record["compiled"], record["graphs"])),
        }
        for cell in cells
        for record in cell["records"]
    ]


def peak(results: Results) -> dict[str, float]:
    """The fastest rates of the rounds, empty where they were not measured."""
    rounds = values(results, "peaks").get("peaks", [])
    return {name: max(rates[name] for rates in rounds) for name in rounds[0]} if rounds else {}


def speed_rows(results: Results) -> Rows:
    return [
        {
            "network": speed["model"],
            "batch": speed["batch"],
            "images/s": round(speed["images_per_s"]),
            "baseline images/s": round(speed["baseline_images_per_s"]),
            "x baseline": round(speed["ratio"], 2),
            "of the bf16 peak %": round(100 * speed["peak_share"], 2) if speed["peak_share"] else None,
            "compiling s": round(speed["compile_seconds"], 1),
        }
        for speed in values(results, "train-speed").values()
        if "images_per_s" in speed
    ]


def at_once_rows(results: Results) -> Rows:
    """Several trainings at once, against one alone."""
    found = [value for name, value in values(results, "train-speed").items() if name.startswith("at-once-")]
    alone = {value["model"]: value["rates"][0] for value in found if value["at_once"] == 1}
    return [
        {
            "network": value["model"],
            "at once": value["at_once"],
            "images/s of all": f"{sum(value['rates']):,.0f}",
            "x alone": f"{sum(value['rates']) / alone[value['model']]:.2f}" if value["model"] in alone else "",
            "without MPS": value["without_mps"] or "",
        }
        for value in found
    ]


def steps_taken(results: Results) -> list[dict[str, Any]]:
    """The steps of each network in each way that they were taken, the fastest first."""
    found = [step for name, step in values(results, "train-speed").items() if name.startswith("step-")]
    first = list(dict.fromkeys(step["model"] for step in found))
    return sorted(found, key=lambda step: (first.index(step["model"]), statistics.median(step["step_ms"])))


def floor_shares(results: Results, step: dict[str, Any]) -> dict[str, float] | None:
    """Shares of the bf16 peak and of the bandwidth that a step's floor is of its time, and the floor in ms."""
    top = peak(results)
    if not top:
        return None
    seconds = statistics.median(step["step_ms"]) / 1000
    compute, memory = step["floor"]["flops"] / top["bf16_flops"], step["floor"]["bytes"] / top["copy_bytes_per_s"]
    return {"compute": compute / seconds, "memory": memory / seconds, "floor_ms": 1000 * max(compute, memory)}


def step_rows(results: Results) -> Rows:
    rows = []
    for step in steps_taken(results):
        row = {
            "network": step["model"],
            "step": step["means"],
            "floor ms": f"{shares['floor_ms']:.3f}" if (shares := floor_shares(results, step)) else "",
            "ms": f"{statistics.median(step['step_ms']):.3f}",
            "kernels ms": f"{step['busy_ms']:.3f}",
            "launches": f"{step['launches']:.0f}",
            "loss differs by": f"{step['agreement']['largest']:.1e}",
        }
        if shares:
            row |= {"of the bf16 peak %": f"{100 * shares['compute']:.1f}"}
            row |= {"of the bandwidth %": f"{100 * shares['memory']:.1f}"}
        if step.get("floor_ms") is not None:
            share = step["floor_ms"] / statistics.median(step["step_ms"])
            row |= {"data sheet's floor ms": f"{step['floor_ms']:.3f}", "of that floor %": f"{100 * share:.1f}"}
        rows.append(row)
    return rows


def step_line(results: Results) -> str:
    steps = {step["model"]: (step["model"], step["floor"]) for step in steps_taken(results)}
    floors = [
        f"{name} {least['flops'] / 1e9:,.1f} GFLOP and {least['bytes'] / 1e9:,.3f} GB" for name, least in steps.values()
    ]
    batch = next((step["batch"] for step in steps_taken(results)), 0)
    return (
        f"Steps at batch {batch}, in bfloat16. The floor is what the device takes for the fewest operations and bytes: "
        f"{'; '.join(floors)}. Losses differ from those of eager steps, both in float32, by that share."
    ) * bool(floors)


def kernel_rows(results: Results) -> Rows:
    """The longest kernels of the fastest step."""
    return [
        {
            "kernel": kernel["name"][:60].replace("|", "/"),
            "launches a step": round(kernel["launches"], 1),
            "us a step": round(kernel["us"], 1),
            "share %": round(100 * kernel["share"], 1),
        }
        for step in steps_taken(results)[:1]
        for kernel in step["kernels"][:KERNELS]
    ]


def fast_cells(results: Results) -> dict[str, dict[str, Any]]:
    """expertgrid's own networks and their matched baselines by name; of a network in two steps, the later."""
    return {cell["model"]: cell for value in values(results, "fast").values() for cell in value.get("cells", [])}


def cell_rows(cells: list[dict[str, Any]], reported: dict[str, str] | None = None) -> Rows:
    """The cells that have records; cells of one network, which have the same ones, are shown once."""
    rows = []
    different = {tuple(record["trial"] for record in cell["records"]): cell for cell in reversed(cells)}
    for trials, cell in reversed(different.items()):
        if not trials:
            continue
        first = cell["records"][0]
        # a level that chooses the network says no more than its name
        levels = {name: level for name, level in cell["levels"].items() if name not in ("model", "reference")}
        shown = {name: json.dumps(level).strip('"') for name, level in levels.items()}
        count = len(cell["records"])
        row: dict[str, object] = {"network": cell["model"], **shown}
        row["n"] = str(count) if count == cell["planned"] else f"{count}/{cell['planned']}"
        row["val acc %"] = interval(mean_of(cell, "validation_accuracy", 100))
        row["test acc %"] = interval(mean_of(cell, "test_accuracy", 100))
        if any(mean_of(other, "test_accuracy_flip") for other in cells):
            row["with flips %"] = interval(mean_of(cell, "test_accuracy_flip", 100))
        if reported:
            row["reported %"] = next((reported[v] for v in cell["levels"].values() if str(v) in reported), "")
        row["training s"] = interval(mean_of(cell, "train_seconds"))
        row["params"], row["MACs"] = (f"{first[name]:,}" for name in ("parameters", "macs"))
        rows.append(row)
    return rows


def how_lines(cells: list[dict[str, Any]]) -> list[str]:
    """With what the steps of all trials were taken, and how many were taken so."""
    used = Counter(
        str(ExecutionPlan(record.get("kernels", False), record.get("compiled", False), record.get("graphs", False)))
        for cell in cells
        for record in cell["records"]
    )
    return (
        [f"Training steps: {'; '.join(f'{how} ({count} trainings)' for how, count in used.items())}."] if used else []
    )


def latest_study(results: Results, piece: str) -> dict[str, Any] | None:
    """Of the steps that train a piece's study with more and more seeds, the last."""
    found = [value for step, value in values(results, piece).items() if step.endswith("-seeds")]
    return found[-1] if found else None


def spread_rows(results: Results) -> Rows:
    """What each change of one thing is worth, and beside it the seed, and the habit of reading each epoch's score."""
    study = values(results, "references").get("spread")
    if study is None:
        return []
    base, *others = study["cells"]
    rows: Rows = []
    for cell in others:
        factor, level = next((name, level) for name, level in cell["levels"].items() if level is not None)
        change = interval(differences(cell, base), "+")
        rows.append({"what": f"{factor} {json.dumps(level)}", "points of validation accuracy": change})
    deviations = [deviation for cell in study["cells"] if (deviation := spread_of(cell)) is not None]
    if deviations:
        pooled = statistics.mean(found**2 for found in deviations) ** 0.5
        rows.append({"what": "another seed: standard deviation", "points of validation accuracy": f"{pooled:.2f}"})
    peeks = [found for found in study["peek"] if found.get("best epoch") is not None]
    if peeks:
        for what, field in (("best epoch", "best epoch"), ("best epoch of the best seed", "best seed and epoch")):
            gain = statistics.mean(found[field] - found["last epoch"] for found in peeks)
            rows.append({"what": f"quoting the {what}: mean", "points of validation accuracy": f"{gain:+.2f}"})
    return rows


def differences(cell: dict[str, Any], base: dict[str, Any]) -> tuple[float, float | None] | None:
    """Mean of the cell's validation accuracy less the base's, paired by seed, and half of its 95% t interval."""
    there = {record["seed"]: record["validation_accuracy"] for record in base["records"]}
    pairs = [record for record in cell["records"] if record["seed"] in there]
    return mean_of(
        {"records": [{"d": record["validation_accuracy"] - there[record["seed"]]} for record in pairs]}, "d", 100
    )


def spread_of(cell: dict[str, Any]) -> float | None:
    found = [100 * record["validation_accuracy"] for record in cell["records"]]
    return statistics.stdev(found) if len(found) > 1 else None


def effect_rows(results: Results) -> Rows:
    """The levels of each factor of the card, and the difference of each to the factor's first level."""
    effects = (latest_study(results, "card") or {}).get("effects", {})
    rows: Rows = []
    for factor, levels in effects.items():
        for level in levels:
            verdict = level["verdict"]
            row: dict[str, object] = {"factor": factor, "level": str(level[factor])}
            row["test acc %"] = from_to(level["test acc %"])
            row["effect on validation"] = from_to(verdict, "+") if verdict else ""
            rows.append(row | {"verdict": verdict["verdict"] if verdict else ""})
    return rows


def from_to(found: dict[str, Any] | None, sign: str = "") -> str:
    """A mean as text, with the two ends of its interval where it has one; "" for no mean."""
    if found is None or found["mean"] is None:
        return ""
    mean = f"{found['mean']:{sign}.2f}"
    return mean if found["low"] is None else f"{mean} ({found['low']:{sign}.2f} to {found['high']:{sign}.2f})"


def exported(results: Results) -> dict[str, dict[str, Any]]:
    """What was exported, with its certificate, by network and precision."""
    return {step.removeprefix("export-"): value for step, value in values(results, "certificates").items()}


def export_rows(results: Results) -> Rows:
    rows: Rows = []
    for what, file in exported(results).items():
        certificate = file["certificate"]
        agreements = certificate["agreements"]
        worst = max(agreements, key=lambda agreement: agreement["largest_difference"])
        rows.append(
            {
                "network": what,
                "MB": f"{file['bytes'] / 1e6:,.2f}",
                "certified on": ", ".join(dict.fromkeys(agreement["provider"] for agreement in agreements)),
                "verdict": "passed" if certificate["passed"] else "rejected",
                "images": f"{certificate['images']:,}",
                "largest logit difference": f"{worst['largest_difference']:.1e}",
                "argmax flips": max(len(agreement["argmax_flips"]) for agreement in agreements),
                "accuracy %": f"{100 * min(agreement['accuracy'] for agreement in agreements):.2f}",
                "PyTorch's": f"{100 * certificate['pytorch_accuracy']:.2f}",
            }
        )
    return rows


def latencies(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Each engine at each batch size, with the network and precision that it ran."""
    found = []
    for step, value in values(results, "inference").items():
        if "latencies" not in value:
            continue
        network, precision, _, where = step.rsplit("-", 3)
        # PyTorch eager is in fp32, whatever the file
        found += [
            (f"{network} {precision}, from the {where}", latency)
            for latency in value["latencies"]
            if precision == "fp32" or not latency["engine"].startswith("pytorch eager")
        ]
    return found


def latency_rows(results: Results) -> Rows:
    return [
        {
            "network": what,
            "engine": latency["engine"],
            "batch": latency["batch"],
            "p50 ms": f"{latency['p50_ms']:.4f}",
            "p99 ms": f"{latency['p99_ms']:.4f}" if latency["p99_ms"] is not None else "",
            "images/s": f"{latency['images_per_s']:,.0f}",
        }
        for what, latency in latencies(results)
    ]


def missing_lines(results: Results) -> list[str]:
    found = [engine for step in values(results, "inference").values() for engine in step.get("missing", [])]
    return [
        f"- Not measured: {line}."
        for line in dict.fromkeys(f"{engine['engine']}: {engine['reason']}" for engine in found)
    ]


def where_lines(results: Results) -> list[str]:
    lines = []
    if any(piece["smoke"] for piece in results.values()):
        lines.append("A smoke run, small: it shows that everything runs, and its numbers say nothing of the device.")
    for here in {
        json.dumps(piece, sort_keys=True): piece for r in results.values() for piece in r["environments"]
    }.values():
        versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
        driver = f"driver {here['driver']}, CUDA {here['cuda']}, " if here.get("driver") else ""
        lines.append(f"{here['device']}, {here['threads']} threads, {driver}Python {here['python']}, {versions}.")
    dates = sorted(step["finished"][:10] for piece in results.values() for step in piece["steps"].values())
    if dates:
        lines.append(f"Measured from {dates[0]} to {dates[-1]}; data: {data_names(results)}.")
    unfinished = [name for name, piece in results.items() if not piece["done"]]
    return lines + ([f"Not finished: {', '.join(unfinished)}."] if unfinished else [])


def data_names(results: Results) -> str:
    return ", ".join(dict.fromkeys(piece["data"] for piece in results.values()))


def markdown(results: Results, picture: str) -> str:
    """All tables, with the picture at that path."""
    top = peak(results)
    peaks: Rows = [{"rate": name, "measured": f"{rate:,.4g}"} for name, rate in top.items()]
    card, references = latest_study(results, "card"), latest_study(results, "references")
    parts: list[tuple[str, Rows, list[str]]] = [
        ("What works here", check_rows(results), []),
        ("What the device can do (operations and bytes a second)", peaks, []),
        ("Training speed on random images of 32x32 pixels", speed_rows(results), []),
        ("Several trainings at once, each in its process", at_once_rows(results), []),
        ("A training step, each way that it can be taken", step_rows(results), [step_line(results)]),
        ("The kernels of the fastest", kernel_rows(results), []),
        (
            f"Seconds of training: {results.get('fast', {}).get('data', '')}",
            cell_rows([*fast_cells(results).values()]),
            how_lines([*fast_cells(results).values()]),
        ),
        (
            f"The card: {results.get('card', {}).get('data', '')}",
            cell_rows(card["cells"]) if card else [],
            how_lines(card["cells"]) if card else [],
        ),
        ("What each factor of the card is worth", effect_rows(results), []),
        ("Exported files", export_rows(results), []),
        ("Inference", latency_rows(results), missing_lines(results)),
        ("The speed of the references, each by its own recipe", epoch_rows(results), []),
        (
            f"The references at full length: {results.get('references', {}).get('data', '')}",
            cell_rows(references["cells"], references["reported"]) if references else [],
            how_lines(references["cells"]) if references else [],
        ),
        ("Where the spread of the reports comes from: one change at a time", spread_rows(results), []),
    ]
    text = "\n".join(["\n\n".join(where_lines(results)), ""])
    for title, rows, lines in parts:
        if rows:
            table = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
            text += "\n".join([f"\n**{title}**\n", table, "", *[line + "\n" for line in lines if line]])
    return f"{text}\n![Training speed and accuracy]({picture})\n"


def draw(results: Results) -> bytes:
    """Images a second of expertgrid's loop and the PyTorch baseline; accuracy against seconds of training. As SVG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = speed_rows(results)
    for title, height, shift in (("expertgrid", "images/s", -0.2), ("PyTorch baseline", "baseline images/s", 0.2)):
        left.barh([i + shift for i in range(len(rows))], [row[height] for row in rows], 0.4, label=title)
    left.set_yticks(range(len(rows)), [row["network"] for row in rows])
    left.set_xlabel("training images a second")
    if rows:
        left.set_xscale("log")
        left.legend()
    studies = [latest_study(results, piece) for piece in ("card", "references")]
    groups = {"fast": [*fast_cells(results).values()]}
    groups |= {name: study["cells"] for name, study in zip(("card", "references"), studies) if study}
    for name, cells in groups.items():
        points = [(mean_of(cell, "train_seconds"), mean_of(cell, "test_accuracy", 100)) for cell in cells]
        points = [(seconds[0], accuracy[0]) for seconds, accuracy in points if seconds and accuracy]
        if points:
            right.scatter(*zip(*points), label=name)
    right.set_xlabel("seconds of training")
    right.set_ylabel("test accuracy, %")
    if right.collections:
        right.set_xscale("log")
        right.legend()
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "expertgrid", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def show(directory: Path | None, target: Path | None, out: Path) -> int:
    """Prints the summary of a directory, or puts it between the markers of a file. Raises InputError."""
    results = read(directory) if directory is not None else {}
    if directory is None or not results:
        print(f"no results in {directory or out}: python -m bench.gpu measures them, on a machine with a GPU")
        return 0
    picture = directory / PICTURE
    if target is None:
        write_whole(picture, draw(results))
        print(markdown(results, str(picture)))
        return 0
    try:
        text = target.read_text()
    except OSError as error:
        raise InputError(f"--write {target}: cannot be read: {error.strerror}") from None
    before, opened, rest = text.partition(MARKERS[0])
    _, closed, after = rest.partition(MARKERS[1])
    if not opened or not closed:
        raise InputError(f"--write {target}: needs the lines {MARKERS[0]} and {MARKERS[1]}, between which it writes")
    write_whole(picture, draw(results))
    inner = markdown(results, os.path.relpath(picture, target.parent))
    write_whole(target, f"{before}{MARKERS[0]}\n{inner}{MARKERS[1]}{after}".encode())
    print(f"{target}: shows {directory.name}")
    return 0

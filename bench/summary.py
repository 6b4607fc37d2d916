"""The results of `bench.gpu` as Markdown tables and a picture, and each target with what was measured.

Reads the pieces' files only; every number that is shown is in them or follows from them.
"""

import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from model.errors import InputError
from model.fast.execution import Means

MARKERS = "<!-- bench.gpu -->", "<!-- /bench.gpu -->"
PICTURE = "summary.svg"
KERNELS = 8  # that are shown
FLIP_TARGETS = {"cifar10": 94.0, "cifar10-jpeg": 90.5}  # percent with flip averaging, of the network for speed
ACCURACY_TARGETS = {"cifar10": 96.0}  # of the network for accuracy; on other data points more than that for speed
ACCURACY_GAIN = 2.0

Results = dict[str, dict[str, Any]]  # the pieces' files by name
Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Target:
    """What was wanted and what was found; `at_least`, or at most."""

    what: str
    wanted: float
    found: float
    unit: str
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted

    def row(self) -> dict[str, object]:
        difference = f"{abs(self.found - self.wanted):,.4g} {self.unit}"
        return {
            "target": self.what,
            "wanted": f"{'at least' if self.at_least else 'at most'} {self.wanted:,.6g} {self.unit}",
            "measured": f"{self.found:,.6g} {self.unit}",
            "verdict": f"{'met' if self.met else 'missed'} by {difference}",
        }


def read(directory: Path) -> Results:
    """The pieces' files. Raises InputError for a damaged one."""
    found = {}
    for file in sorted(directory.glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_text())
            found[file.stem]["steps"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{file}: damaged: no results of bench.gpu") from None
    return found


def newest(out: Path) -> Path | None:
    """The directory in `out` that has the latest results."""
    found = [file for file in out.glob("*/*.json") if file.parent.name[-10:].count("-") == 2]
    return max(found, key=lambda file: (file.parent.name[-10:], file.stat().st_mtime)).parent if found else None


def values(results: Results, piece: str) -> dict[str, Any]:
    """What the steps of a piece measured, by step."""
    return {step: one["value"] for step, one in results.get(piece, {"steps": {}})["steps"].items()}


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
    """Of seeds that all agree there is none."""
    if found is None:
        return ""
    return f"{found[0]:{sign}.2f}" + (f" ± {found[1]:.2f}" if found[1] else "")


def peak(results: Results) -> dict[str, float]:
    """The fastest rates of the rounds, empty where they were not measured."""
    rounds = values(results, "peaks").get("peaks", [])
    return {name: max(one[name] for one in rounds) for name in rounds[0]} if rounds else {}


def speed_rows(results: Results) -> Rows:
    return [
        {
            "network": one["model"],
            "batch": one["batch"],
            "images/s": round(one["images_per_s"]),
            "plain images/s": round(one["plain_images_per_s"]),
            "x plain": round(one["ratio"], 2),
            "of the bf16 peak %": round(100 * one["peak_share"], 2),
            "compiling s": round(one["compile_seconds"], 1),
        }
        for one in values(results, "train-speed").values()
        if "images_per_s" in one
    ]


def steps_taken(results: Results) -> list[dict[str, Any]]:
    """The steps of each network in each way that they were taken, the fastest first."""
    found = [one for name, one in values(results, "train-speed").items() if name.startswith("step-")]
    first = list(dict.fromkeys(one["model"] for one in found))
    return sorted(found, key=lambda one: (first.index(one["model"]), statistics.median(one["step_ms"])))


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
        rows.append(row)
    return rows


def step_line(results: Results) -> str:
    floors = {
        one[
            "model"
        ]: f"{one['model']} {one['floor']['flops'] / 1e9:,.1f} GFLOP and {one['floor']['bytes'] / 1e9:,.3f} GB"
        for one in steps_taken(results)
    }
    batch = next((one["batch"] for one in steps_taken(results)), 0)
    return (
        f"Steps at batch {batch}, in bfloat16. The floor is what the device takes for the fewest operations and bytes: "
        f"{'; '.join(floors.values())}. Losses differ from those of plain steps, both in float32, by that share."
    ) * bool(floors)


def kernel_rows(results: Results) -> Rows:
    """The longest kernels of the fastest step."""
    return [
        {
            "kernel": one["name"][:60].replace("|", "/"),
            "launches a step": round(one["launches"], 1),
            "us a step": round(one["us"], 1),
            "share %": round(100 * one["share"], 1),
        }
        for step in steps_taken(results)[:1]
        for one in step["kernels"][:KERNELS]
    ]


def fast_cells(results: Results) -> dict[str, dict[str, Any]]:
    """Our networks and their twins by name; of a network that is in two steps, the later."""
    return {cell["model"]: cell for one in values(results, "fast").values() for cell in one.get("cells", [])}


def cell_rows(cells: list[dict[str, Any]], reported: dict[str, str] | None = None) -> Rows:
    rows = []
    for cell in cells:
        first = cell["records"][0] if cell["records"] else {}
        # a level that chooses the network says no more than its name
        levels = {name: level for name, level in cell["levels"].items() if name not in ("model", "reference")}
        shown = {name: json.dumps(level).strip('"') for name, level in levels.items()}
        count = len(cell["records"])
        row: dict[str, object] = {"network": cell["model"], **shown}
        row["n"] = str(count) if count == cell["planned"] else f"{count}/{cell['planned']}"
        row["val acc %"] = interval(mean_of(cell, "validation_accuracy", 100))
        row["test acc %"] = interval(mean_of(cell, "test_accuracy", 100))
        if any(mean_of(one, "test_accuracy_flip") for one in cells):
            row["with flips %"] = interval(mean_of(cell, "test_accuracy_flip", 100))
        if reported:
            row["reported %"] = next((reported[v] for v in cell["levels"].values() if str(v) in reported), "")
        row["training s"] = interval(mean_of(cell, "train_seconds"))
        row["params"], row["MACs"] = (f"{first[name]:,}" if first else "" for name in ("parameters", "macs"))
        rows.append(row)
    return rows


def how_lines(cells: list[dict[str, Any]]) -> list[str]:
    """With what the steps of all trials were taken, and how many were taken so."""
    used = Counter(
        str(Means(record.get("kernels", False), record.get("compiled", False), record.get("graphs", False)))
        for cell in cells
        for record in cell["records"]
    )
    return (
        [f"Training steps: {'; '.join(f'{how} ({count} trainings)' for how, count in used.items())}."] if used else []
    )


def latest_study(results: Results, piece: str) -> dict[str, Any] | None:
    """Of the steps that train a piece's study with more and more seeds, the last."""
    found = [one for step, one in values(results, piece).items() if step.endswith("-seeds")]
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
        pooled = statistics.mean(one**2 for one in deviations) ** 0.5
        rows.append({"what": "another seed: standard deviation", "points of validation accuracy": f"{pooled:.2f}"})
    peeks = [one for one in study["peek"] if one.get("best epoch") is not None]
    if peeks:
        for what, field in (("best epoch", "best epoch"), ("best epoch of the best seed", "best seed and epoch")):
            gain = statistics.mean(one[field] - one["last epoch"] for one in peeks)
            rows.append({"what": f"quoting the {what}: mean", "points of validation accuracy": f"{gain:+.2f}"})
    return rows


def differences(cell: dict[str, Any], base: dict[str, Any]) -> tuple[float, float | None] | None:
    """Mean of the cell's validation accuracy less the base's, paired by seed, and half of its 95% t interval."""
    there = {record["seed"]: record["validation_accuracy"] for record in base["records"]}
    pairs = [record for record in cell["records"] if record["seed"] in there]
    return mean_of({"records": [{"d": one["validation_accuracy"] - there[one["seed"]]} for one in pairs]}, "d", 100)


def spread_of(cell: dict[str, Any]) -> float | None:
    found = [100 * record["validation_accuracy"] for record in cell["records"]]
    return statistics.stdev(found) if len(found) > 1 else None


def effect_rows(results: Results) -> Rows:
    effects = (latest_study(results, "card") or {}).get("effects", {})
    return [
        {
            "factor": factor,
            "level": str(row.get(factor, "")),
            "test acc %": interval((row["test acc %"]["mean"], row["test acc %"]["half_width"])),
            "effect on validation": interval((row["effect"]["mean"], row["effect"]["half_width"]))
            if isinstance(row.get("effect"), dict)
            else "",
            "verdict": row["verdict"]["verdict"] if isinstance(row.get("verdict"), dict) else "",
        }
        for factor, rows in effects.items()
        for row in rows
        if isinstance(row.get("test acc %"), dict)
    ]


def exported(results: Results) -> dict[str, dict[str, Any]]:
    """What was exported, with its certificate, by network and precision."""
    found = values(results, "fast") | values(results, "inference")
    return {step.removeprefix("export-"): one for step, one in found.items() if step.startswith("export-")}


def export_rows(results: Results) -> Rows:
    rows = []
    for what, one in exported(results).items():
        certificate = one["certificate"]
        agreements = certificate["agreements"]
        worst = max(agreements, key=lambda agreement: agreement["largest_difference"])
        rows.append(
            {
                "network": what,
                "MB": f"{one['bytes'] / 1e6:,.2f}",
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


def export_lines(results: Results) -> list[str]:
    return [
        f"- Not certified on CUDA: {what}: {one['not_on_cuda']}."
        for what, one in exported(results).items()
        if "not_on_cuda" in one
    ]


def latencies(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Each engine at each batch size, with the network and precision that it ran."""
    found = []
    for step, one in values(results, "inference").items():
        if "latencies" not in one:
            continue
        network, precision, _, where = step.rsplit("-", 3)
        # PyTorch eager is in fp32, whatever the file
        found += [
            (f"{network} {precision}, from the {where}", latency)
            for latency in one["latencies"]
            if precision == "fp32" or not latency["engine"].startswith("pytorch eager")
        ]
    return found


def latency_rows(results: Results) -> Rows:
    return [
        {
            "network": what,
            "engine": one["engine"],
            "batch": one["batch"],
            "p50 ms": f"{one['p50_ms']:.4f}",
            "p99 ms": f"{one['p99_ms']:.4f}",
            "images/s": f"{one['images_per_s']:,.0f}",
        }
        for what, one in latencies(results)
    ]


def missing_lines(results: Results) -> list[str]:
    found = [one for step in values(results, "inference").values() for one in step.get("missing", [])]
    return [f"- Not measured: {line}." for line in dict.fromkeys(f"{one['engine']}: {one['reason']}" for one in found)]


def targets(results: Results) -> list[Target]:
    """The targets for which something was measured."""
    found = []
    if (taken := steps_taken(results)) and (shares := floor_shares(results, taken[0])):
        binds = "compute" if shares["compute"] >= shares["memory"] else "memory"
        what = {"compute": "the bf16 peak", "memory": "the bandwidth"}[binds]
        wanted = {"compute": 40.0, "memory": 70.0}[binds]
        found.append(Target(f"a step of eight_block, which {what} binds", wanted, 100 * shares[binds], "%"))
    if speed := values(results, "train-speed").get("eight_block"):
        found.append(Target("training of eight_block against the plain way", 20.0, speed["ratio"], "x"))
    found += fast_targets(results)
    for piece, seeds, most in (("card", 5, 30.0), ("references", 1, 20.0)):
        if minutes := study_minutes(values(results, piece).get(f"{seeds}-seeds")):
            found.append(Target(f"training of the {piece}, {seeds} seeds", most, minutes, "minutes", at_least=False))
    if files := exported(results).values():
        passed = [one["certificate"]["passed"] and "rejected" not in one for one in files]
        found.append(Target(f"of {len(passed)} exported files passed", 100.0, 100 * sum(passed) / len(passed), "%"))
    on_cuda = [(what, one) for what, one in latencies(results) if one["engine"].startswith("onnxruntime cuda")]
    at_once = [one for what, one in on_cuda if one["batch"] == 1 and what.startswith("eight_block fp16")]
    if at_once:
        best = min(at_once, key=lambda one: one["p50_ms"])
        what = f"latency of eight_block at batch 1, fp16 ({best['engine']})"
        found.append(Target(what, 150.0, 1000 * best["p50_ms"], "us", at_least=False))
    if on_cuda:
        what, one = max(on_cuda, key=lambda pair: pair[1]["images_per_s"])
        name = f"images a second ({what}, {one['engine']}, batch {one['batch']})"
        found.append(Target(name, 100_000.0, one["images_per_s"], "images/s"))
    return found


def study_minutes(study: dict[str, Any] | None) -> float | None:
    """Minutes that a study compiled and trained; None where some trial is not finished."""
    if study is None or any(len(cell["records"]) < cell["planned"] for cell in study["cells"]):
        return None
    records = [record for cell in study["cells"] for record in cell["records"]]
    return sum(record["train_seconds"] + record["compile_seconds"] for record in records) / 60


def fast_targets(results: Results) -> list[Target]:
    cells, data = fast_cells(results), results.get("fast", {}).get("data")
    flips = {name: mean_of(cells[name], "test_accuracy_flip", 100) for name in ("speed", "accuracy") if name in cells}
    times = {name: mean_of(cells[name], "train_seconds") for name in flips}
    found = []
    if flips.get("speed") and data in FLIP_TARGETS:
        found.append(Target(f"speed on {data}, with flips", FLIP_TARGETS[data], flips["speed"][0], "%"))
    if flips.get("accuracy") and data in ACCURACY_TARGETS:
        found.append(Target(f"accuracy on {data}, with flips", ACCURACY_TARGETS[data], flips["accuracy"][0], "%"))
    elif flips.get("accuracy") and flips.get("speed"):
        gain = flips["accuracy"][0] - flips["speed"][0]
        found.append(Target(f"accuracy over speed on {data}, with flips", ACCURACY_GAIN, gain, "points"))
    for name, seconds in (("speed", 6.0), ("accuracy", 60.0)):
        if times.get(name):
            found.append(Target(f"training of {name}, once compiled", seconds, times[name][0], "s", at_least=False))
    return found


def where_lines(results: Results) -> list[str]:
    lines = []
    if any(one["smoke"] for one in results.values()):
        lines.append("A smoke run, small: it shows that everything runs, and its numbers say nothing of the device.")
    for here in {json.dumps(one, sort_keys=True): one for r in results.values() for one in r["environments"]}.values():
        versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
        driver = f"driver {here['driver']}, CUDA {here['cuda']}, " if here.get("driver") else ""
        lines.append(f"{here['device']}, {here['threads']} threads, {driver}Python {here['python']}, {versions}.")
    dates = sorted(step["finished"][:10] for one in results.values() for step in one["steps"].values())
    if dates:
        lines.append(f"Measured from {dates[0]} to {dates[-1]}; data: {data_names(results)}.")
    unfinished = [name for name, one in results.items() if not one["done"]]
    return lines + ([f"Not finished: {', '.join(unfinished)}."] if unfinished else [])


def data_names(results: Results) -> str:
    return ", ".join(dict.fromkeys(one["data"] for one in results.values()))


def markdown(results: Results, picture: str) -> str:
    """All tables, with the picture at that path."""
    top = peak(results)
    peaks = [{"rate": name, "measured": f"{rate:,.4g}"} for name, rate in top.items()]
    card, references = latest_study(results, "card"), latest_study(results, "references")
    parts: list[tuple[str, Rows, list[str]]] = [
        ("Targets", [one.row() for one in targets(results)], []),
        ("What the device can do (operations and bytes a second)", peaks, []),
        ("Training speed on random images of 32x32 pixels", speed_rows(results), []),
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
        ("Exported files", export_rows(results), export_lines(results)),
        ("Inference", latency_rows(results), missing_lines(results)),
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
    """Images a second of our loop and the plain way, and accuracy against seconds of training, as SVG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = speed_rows(results)
    for title, height, shift in (("expertgrid", "images/s", -0.2), ("the plain way", "plain images/s", 0.2)):
        left.barh([i + shift for i in range(len(rows))], [row[height] for row in rows], 0.4, label=title)
    left.set_yticks(range(len(rows)), [row["network"] for row in rows])
    left.set_xlabel("training images a second")
    if rows:
        left.set_xscale("log")
        left.legend()
    studies = [latest_study(results, piece) for piece in ("card", "references")]
    groups = {"fast": [*fast_cells(results).values()]}
    groups |= {name: one["cells"] for name, one in zip(("card", "references"), studies) if one}
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


def show(directory: Path | None, target: Path | None, out: Path, write: Callable[[Path, bytes], None]) -> int:
    """Prints the summary of a directory, or puts it between the markers of a file. Raises InputError."""
    results = read(directory) if directory is not None else {}
    if not results:
        print(f"no results in {directory or out}: python -m bench.gpu measures them, on a machine with a GPU")
        return 0
    picture = directory / PICTURE
    if target is None:
        write(picture, draw(results))
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
    write(picture, draw(results))
    inner = markdown(results, os.path.relpath(picture, target.parent))
    write(target, f"{before}{MARKERS[0]}\n{inner}{MARKERS[1]}{after}".encode())
    print(f"{target}: shows {directory.name}")
    return 0

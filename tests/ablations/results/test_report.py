"""The report: what it says on studies made by hand, of any size, and what a browser makes of a trained one."""

import ast
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, change_json, write_latency, written_epochs, written_record

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import Failure
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.report import plots, report
from expertgrid.ablations.results.report.findings import Examined, Mistake, read_findings, worst
from expertgrid.ablations.results.report.gates import block_gate
from expertgrid.ablations.results.report.pictures import Picture, pictures
from expertgrid.ablations.results.rows import pareto
from expertgrid.ablations.results.stats.images import class_accuracies
from expertgrid.ablations.results.tables.cells import cell_table
from expertgrid.model.system.errors import InputError

HOSTILE = "<script>alert('1')</script>"


def write_study(path: Path, factors: dict[str, list], scores_LS: np.ndarray, epochs: int = 3, **fields: str) -> Path:
    """A study directory with these validation accuracies: nan for a trial that is not finished."""
    texts = {"question": "Which?", "source": "digits", "data": "digits: many images", "design": "factorial"} | fields
    scores_CS = scores_LS.reshape(-1, scores_LS.shape[-1])
    levels = [dict(zip(factors, place)) for place in np.ndindex(*map(len, factors.values()))]
    cells, directory = [], StudyDirectory(path)
    rng = np.random.default_rng(0)
    for number, (places, scores_S) in enumerate(zip(levels, scores_CS)):
        trials = [f"{number:08x}{seed:04x}" for seed in range(len(scores_S))]
        chosen = {name: factors[name][place] for name, place in places.items()}
        cells.append({"model_name": "two_block", "levels": chosen, "trials": trials})
        for seed, (trial, score) in enumerate(zip(trials, scores_S)):
            directory.trial(trial).mkdir(parents=True)
            if np.isnan(score):
                continue
            costs = {"parameters": 100 * (number + 1), "macs": 1000 * (number + 1), "epochs": epochs}
            record = written_record(SimpleNamespace(id=trial, seed=seed), 100 * score, 100 * score - 1, **costs)
            (directory.trial(trial) / "record.json").write_text(record)
            written_epochs(directory, trial, 100 * (score + rng.normal(0, 0.01, epochs)))
            directory.enter_test_read(trial, "training", 1000)
    toml = "".join(f"{json.dumps(name)} = {json.dumps(of)}\n" for name, of in factors.items())
    (path / "study.toml").write_text(
        f"question = {json.dumps(texts['question'])}\ndesign = '{texts['design']}'\nseeds = {scores_CS.shape[1]}\n"
        f"[base]\ndata = {json.dumps(texts['source'])}\n[factors]\n{toml}"
    )
    (path / "plan.json").write_text(json.dumps({"data": texts["data"], "source": texts["source"], "cells": cells}))
    return path


@pytest.fixture
def two_by_two(tmp_path) -> Path:
    """Four cells of three seeds: four experts are better by 10 points, the gate does nothing much."""
    noise = np.array([0.0, 0.004, -0.003])
    scores = np.array([[0.80 + noise, 0.801 + noise[::-1]], [0.90 + noise / 2, 0.903 + noise]])
    return write_study(tmp_path / "study", {"experts": [1, 4], "gate": ["linear", "mlp"]}, scores)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Reports have no figures, which take most of their time."""
    monkeypatch.setattr(Picture, "uri", "data:image/svg+xml,")


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def page_of(path: Path) -> Page:
    return Page(report.html(read_findings(StudyDirectory(path))))


def check_accessible_and_whole(page: Page) -> None:
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(title.get("scope") in ("col", "row") for title in page.all("th"))
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(link["href"].startswith(("#", "data:")) for tag in ("a", "link") for link in page.all(tag))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]


# --- Statistics of its own ---


def test_pareto_front():
    assert pareto([3, 1, 2, 2, 4], [0.9, 0.5, 0.5, 0.7, 0.9]) == [1, 3, 0]
    assert pareto([1, 1], [0.5, 0.6]) == [1]
    assert pareto([], []) == []


def test_worst_mistakes_come_first():
    logits_BN = np.array([[0.0, 5.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
    pixels_BHWC = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    mistakes = worst(logits_BN, np.array([0, 0, 0, 1]), pixels_BHWC, ["cat", "dog"])
    assert [int(mistake.pixels_HWC[0, 0, 0]) for mistake in mistakes] == [0, 2]
    assert (mistakes[0].truth, mistakes[0].taken) == ("cat", "dog")
    assert mistakes[0].probability == pytest.approx(1 / (1 + np.exp(-5)))


# --- What it says ---


def test_it_answers_with_what_is_decided(two_by_two):
    page = page_of(two_by_two)
    check_accessible_and_whole(page)
    # The MACs of the matched cells are 3 and 2 times as many: sqrt(6) in the geometric mean.
    parts = (
        "Going from 1 to 4 experts adds 10.1 points for 2.4 times the MACs; gate mlp instead of ",
        "What each factor does (validation accuracy, points; 3 seeds",
        "Cells,",
    )
    places = [page.text.index(part) for part in parts]
    assert places == sorted(places)
    assert "at most 1 such table in 20 would hold a wrong verdict" in page.text
    assert "Best on validation: experts 4, gate mlp, 90.33 (" in page.text
    assert "12 trials were planned: 12 finished." in page.text
    assert "The study directory" not in page.text
    assert "The checkpoint of trial 000000030001 is not in the study directory." in page.text
    assert "fewer than two cells have a measured latency" in page.text
    assert f"expertgrid rerun {two_by_two} 000000000000" in page.text
    alts = [image["alt"] for image in page.all("img")]
    assert any(alt.startswith("Main effects: experts 1 -> 4: +10.09") for alt in alts)
    assert any(alt.startswith("Interactions: experts 1 -> 4, with gate linear -> mlp") for alt in alts)


def test_of_one_seed_it_says_that_nothing_is_decided(tmp_path):
    path = write_study(tmp_path / "one", {"experts": [1, 2]}, np.array([[0.8], [0.9]]))
    page = page_of(path)
    check_accessible_and_whole(page)
    assert "Whether a second expert is better or worse is not decided." in page.text
    assert "Each cell has one seed: one number has no spread, so there are no intervals and no verdicts." in page.text
    assert "at most 1 such table" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_one_at_a_time(tmp_path):
    scores = np.array([[0.80, 0.81, 0.82], [0.91, 0.92, 0.925], [0.80, 0.82, 0.81]])
    path = write_study(tmp_path / "one", {"experts": [1, 2, 4]}, scores)
    first, *others = json.loads((path / "plan.json").read_text())["cells"]
    change_json(path / "plan.json", cells=[first | {"levels": {"experts": None}}, *others])
    toml = "question = 'Which?'\ndesign = 'one_at_a_time'\nseeds = 3\n[factors]\nexperts = [2, 4]"
    (path / "study.toml").write_text(toml)
    alts = [image["alt"] for image in page_of(path).all("img")]
    assert any(alt.startswith("Main effects: experts base -> 2: +10.83") for alt in alts)


@pytest.mark.usefixtures("undrawn")
def test_images_on_which_two_cells_differ_at_every_seed(two_by_two):
    """The best cell against the base: image 1 is recognised by all networks of the best and by none of the base."""
    labels = np.array([0, 1, 2, 0])
    for cell, test in ((0, [0, 2, 2, 0]), (3, [0, 1, 0, 0])):
        for seed in range(3):
            predictions = Predictions(labels, labels, np.array(test if seed else [*test[:3], 1]), labels)
            (two_by_two / "trials" / f"{cell:08x}{seed:04x}" / "predictions.npz").write_bytes(predictions.to_bytes())
    before = (two_by_two / "ledger.jsonl").read_bytes()
    differences = read_findings(StudyDirectory(two_by_two)).images
    assert (differences.first.name, differences.second.name) == ("experts 4, gate mlp", "experts 1, gate linear")
    for images, expected in (
        (differences.only_first, (1, "1", "1", "2")),
        (differences.only_second, (2, "2", "0", "2")),
    ):
        assert [(image.number, image.truth, image.first, image.second) for image in images] == [expected]
    # of 20 ways to choose 3 of 6 networks, two keep a cell whole
    assert differences.by_chance == pytest.approx(2 * 2 / 20)
    page = page_of(two_by_two)
    check_accessible_and_whole(page)
    assert "All networks of A recognise 1 images that no network of B does; for B it is 1." in page.text
    assert "Two equal cells would show about 0.2 of both kinds." in page.text
    assert (two_by_two / "ledger.jsonl").read_bytes() == before


def test_missing_diverged_and_failed_trials_are_counted_and_named(tmp_path):
    scores = np.array([[0.8, 0.81], [np.nan, 0.9], [np.nan, np.nan]])
    path = write_study(tmp_path / "holes", {"experts": [1, 2, 4]}, scores)
    diverged = Failure(kind="diverged", error="the loss is nan", traceback="", time="", step=7, epoch=1, lr=0.1)
    StudyDirectory(path).write_failure("000000010000", diverged)
    page = page_of(path)
    check_accessible_and_whole(page)
    assert "6 trials were planned: 3 finished, 1 diverged, 2 not finished." in page.text
    assert "experts 2, trial 000000010000: diverged: the loss is nan" in page.text
    assert "experts 4, trial 000000020001: not finished" in page.text
    assert "3 trials are missing or failed" in page.text
    assert f"expertgrid run {path}/study.toml --out {path}" in page.text


def test_notes_name_at_most_five_cells_or_trials(tmp_path):
    for count, cells, trials in (
        (6, "; ".join(f"experts {k}" for k in range(2, 7)), ", ".join(f"{k:08x}0000" for k in range(1, 6))),
        (7, "experts 2; experts 3; experts 4 and 3 more", "000000010000, 000000020000, 000000030000 and 3 more"),
    ):
        scores = np.full((count, 1), np.nan)
        scores[0] = 0.9
        directory = StudyDirectory(write_study(tmp_path / str(count), {"experts": list(range(1, count + 1))}, scores))
        notes = cell_table(directory, read_evidence(directory)).notes
        assert [note for note in notes if note.startswith(("Open", "Not finished"))] == [
            f"Open: {cells}: its cells cannot be compared by the trials that are finished.",
            f"Not finished: {count - 1} of the trials: {trials}.",
        ]


def test_a_study_without_a_finished_trial(tmp_path):
    page = page_of(write_study(tmp_path / "none", {"experts": [1, 2]}, np.full((2, 2), np.nan)))
    check_accessible_and_whole(page)
    assert "No trial is finished, so there is no answer yet." in page.text


def test_a_measured_latency_takes_the_place_of_macs(two_by_two):
    for trial, p50_ms in (("000000000000", 0.5), ("000000030000", 2.5)):
        write_latency(two_by_two, trial, p50_ms, interval_ms=(p50_ms - 0.1, p50_ms + 0.1))
    alts = [image["alt"] for image in page_of(two_by_two).all("img")]
    title = "Validation accuracy against measured latency, ms (median, batch 1); the Pareto front is 1: "
    assert any(title in alt for alt in alts)


@pytest.mark.usefixtures("undrawn")
def test_the_confusion_matrix_needs_no_checkpoint_and_no_data(two_by_two):
    labels = np.array([0, 1, 1, 2])
    predictions = Predictions(labels, labels, np.array([0, 1, 2, 2]), labels)
    (two_by_two / "trials" / "000000030001" / "predictions.npz").write_bytes(predictions.to_bytes())
    page = page_of(two_by_two)
    assert "3 of 4 test images are on the diagonal" in page.text
    assert "1 taken for 2: 1" in page.text


def test_every_string_of_a_user_is_escaped(tmp_path):
    scores = np.array([[0.8, 0.81], [0.9, 0.92]])
    fields = {"question": HOSTILE, "source": f"folder:{HOSTILE}", "data": HOSTILE}
    path = write_study(tmp_path / "<script>name", {"model": ["two_block", HOSTILE.replace("/", "")]}, scores, **fields)
    findings = read_findings(StudyDirectory(path))
    classes = (HOSTILE, "<b>", "a & b")
    confusion_NN = np.array([[3, 1, 0], [0, 2, 0], [1, 0, 4]])
    gate = block_gate("layers.1", np.full((6, 2), 0.5), np.arange(6) % 3, 3)
    best = findings.ranked[0]
    examined = Examined(
        best, "trial", classes, confusion_NN, "test", class_accuracies(confusion_NN),
        [Mistake(np.zeros((2, 2, 3), np.uint8), HOSTILE, "<b>", 0.9)], 1, 6, [gate], best, "trial", {},
    )  # fmt: skip
    html = report.html(replace(findings, examined=examined))
    page = Page(html)
    check_accessible_and_whole(page)
    assert "<script>alert" not in html
    assert "<script>name" not in html
    assert not page.all("b")
    for text in (HOSTILE, f"folder:{HOSTILE}", f"is {HOSTILE}"):
        assert text in page.text
    for picture in pictures(replace(findings, examined=examined)):
        assert b"<script" not in plots.save(picture.draw())


def test_of_many_classes_some_are_named():
    labels_B = np.arange(400) % 100
    gate = block_gate("layers.1", np.random.default_rng(0).dirichlet(np.ones(4), 400), labels_B, 100)
    names = [f"a class with the number {n}" for n in range(100)]
    for figure in (
        plots.gate_figure(gate, names),
        plots.confusion_figure(np.eye(100, dtype=int) * 4, names),
    ):
        assert len(plots.save(figure)) < 300_000


# --- As a command ---


def test_command_writes_the_report_and_the_figures(expertgrid, tmp_path):
    study = write_study(tmp_path / "two", {"experts": [1, 2]}, np.array([[0.8, 0.81], [0.9, 0.92]]))
    outcome = expertgrid("report", study)
    assert (outcome.status, outcome.out.split()) == (0, [str(study / "report.html")])
    first = (study / "report.html").read_bytes()
    assert expertgrid("report", study).status == 0
    assert (study / "report.html").read_bytes() == first

    outcome = expertgrid("report", study, "--format", "pdf-figures", "--out", tmp_path / "figures")
    assert outcome.status == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert {"accuracy.pdf", "main-effects.pdf", "curves-1.pdf", "cost.pdf"} <= files.keys()
    assert all(content.startswith(b"%PDF") for content in files.values())
    assert expertgrid("report", study, "--format", "png-figures").status == 0
    assert (study / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "damaged",
    ["trials/000000000001/record.json", "trials/000000030001/epochs.jsonl", "ledger.jsonl", "plan.json", "study.toml"],
)
def test_a_damaged_file_is_named_in_one_line(expertgrid, two_by_two, damaged):
    file = two_by_two / damaged
    file.write_bytes(file.read_bytes()[:-25] + b"\xff\n")
    outcome = expertgrid("report", two_by_two)
    assert outcome.status == 2
    assert str(file) in outcome.complaint
    assert not (two_by_two / "report.html").exists()


def test_two_studies_side_by_side(expertgrid, two_by_two, tmp_path):
    scores = np.array([[[0.70, 0.71, 0.69], [0.70, 0.70, 0.70]], [[0.72, 0.73, 0.71], [0.72, 0.72, 0.71]]])
    factors = {"experts": [1, 4], "gate": ["linear", "mlp"]}
    after, other = (
        write_study(tmp_path / "after", factors, scores),
        write_study(tmp_path / "o", {"experts": [1]}, scores[0]),
    )
    out = tmp_path / "both.html"
    assert expertgrid("report", two_by_two, after, "--out", out).status == 0
    page = Page(out.read_text())
    assert page.all("script") == []
    effects = [
        f"{of.effects[0].judgement.mean:+.2f}" for of in map(read_evidence, map(StudyDirectory, (two_by_two, after)))
    ]
    assert re.search(rf"experts 1 -> 4 {re.escape(effects[0])} .*? {re.escape(effects[1])} ", page.text)
    assert "No verdict is about the difference between the two." in page.text
    for arguments, words in (
        ((two_by_two, other, "--out", out), f"{two_by_two} and {other} have different factors"),
        ((two_by_two, after), "two studies: need --out FILE.html"),
        ((two_by_two, after, other, "--out", out), "3 studies: a report is of one, or of two"),
    ):
        outcome = expertgrid("report", *arguments)
        assert outcome.status == 2
        assert words in outcome.complaint
    change_json(after / "plan.json", data="digits: fewer images")
    assert (
        "have different data: digits: many images and digits: fewer"
        in expertgrid("report", two_by_two, after, "--out", out).complaint
    )


def test_wrong_options(expertgrid, two_by_two, tmp_path):
    for arguments, words in {
        ("--format", "doc"): "'doc' is not one of 'html', 'pdf-figures', 'png-figures'",
        ("--out", tmp_path): "an .html file",
        ("--format", "png-figures", "--out", two_by_two / "plan.json"): "the name of a directory",
    }.items():
        outcome = expertgrid("report", two_by_two, *arguments)
        assert outcome.status == 2
        assert words in outcome.complaint
    assert expertgrid("report", tmp_path / "nothing").status == 2


@pytest.mark.parametrize(
    ("cutouts", "seeds", "epochs"), [(2, 2, 3), pytest.param(10, 5, 100, marks=pytest.mark.nightly)]
)
def test_many_trials(expertgrid, tmp_path, request, cutouts, seeds, epochs):
    """At night a thousand trials of a hundred epochs, in seconds."""
    rng, shape = np.random.default_rng(0), (5, 4, cutouts, seeds)
    factors = {"experts": [1, 2, 3, 4, 6], "kernel": [1, 3, 5, 7], "cutout": list(range(cutouts))}
    scores_LS = 0.9 + rng.normal(0, 0.01, (*shape[:3], 1)) + rng.normal(0, 0.005, shape)
    path = write_study(tmp_path / "large", factors, scores_LS, epochs=epochs)
    if epochs < 100:
        request.getfixturevalue("undrawn")
    started = time.process_time()
    assert expertgrid("table", path).status == 0
    table_s = time.process_time() - started
    html = report.html(read_findings(StudyDirectory(path)))
    report_s = time.process_time() - started - table_s
    if epochs == 100:
        assert table_s < 3
        assert report_s < 10
    assert len(html.encode()) < 5_000_000
    page = Page(html)
    check_accessible_and_whole(page)
    assert f"The 6 cells that are best on validation, of {20 * cutouts}" in page.text
    assert f"The 24 best of {20 * cutouts} cells" in page.text


# --- On a trained study ---


def test_of_a_trained_study_it_shows_gates_and_mistakes_and_reads_no_test_image(trained_study, tmp_path, monkeypatch):
    directory = StudyDirectory(trained_study)
    before = directory.test_reads()
    findings = read_findings(directory)
    examined = findings.examined
    record = directory.record(examined.trial)
    assert examined.missing == {}
    assert examined.wrong == pytest.approx((1 - record.validation_accuracy) * record.validation_images)
    assert examined.confusion_split == "test"
    assert np.trace(examined.confusion_NN) == pytest.approx(record.test_accuracy * record.test_images)
    assert [gate.experts for gate in examined.gates] == [2] * len(examined.gates) != []
    check_accessible_and_whole(Page(report.html(findings)))
    assert directory.test_reads() == before


@pytest.mark.usefixtures("undrawn")
def test_without_the_data_it_is_made_with_a_line_that_says_so(trained_study, tmp_path):
    path = shutil.copytree(trained_study, tmp_path / "elsewhere")
    for source, words in {
        f"folder:{tmp_path}/gone": "The images are not available on this machine",
        "digits": "data source 'digits': has other images than trial",
    }.items():
        change_json(path / "plan.json", source=source)
        for config in path.glob("trials/*/config.json"):
            change_json(config, fingerprint="other")
        page = page_of(path)
        assert page.text.count(words) == 1  # for gates and mistakes; the confusion matrix is of kept predictions
    with pytest.raises(InputError, match="--data-dir is for cifar"):
        read_findings(StudyDirectory(path), data_dir=tmp_path)
    with pytest.raises(InputError, match="data source 'digits': has other images"):
        read_findings(StudyDirectory(path), "digits")


@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser(browser, trained_study, tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(report.html(read_findings(StudyDirectory(trained_study))))
    messages, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")

    def column(title: str) -> list[str]:
        titles = [text.strip() for text in page.locator("#cells thead th").all_inner_texts()]
        rows = page.locator("#cells tbody tr:visible")
        return [rows.nth(i).locator("th, td").nth(titles.index(title)).inner_text() for i in range(rows.count())]

    accuracies = [float(text.split()[0]) for text in column("val acc %")]
    title = page.locator("#cells thead th", has_text="val acc %")
    for order, expected in (("ascending", sorted(accuracies)), ("descending", sorted(accuracies, reverse=True))):
        title.locator("button").click()
        assert title.get_attribute("aria-sort") == order
        assert [float(text.split()[0]) for text in column("val acc %")] == expected
    page.get_by_label("Only rows with").fill("mlp")
    assert column("gate") == ["mlp"]
    assert page.locator("output").inner_text() == f"1 of {len(accuracies)} rows"
    assert messages == []
    page.close()


def test_matplotlib_is_loaded_only_to_draw():
    body = ast.parse((REPOSITORY / "ablations" / "results" / "report" / "plots.py").read_text()).body
    imports = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "matplotlib" not in " ".join(imports)

"""What a study's verdicts are made of, on records that were written for it: by hand, and against scipy."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from conftest import change_json, write_latency, write_study, written_epochs

from expertgrid.ablations.cli.plan import read_request
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.plan import Plan, RaceRules
from expertgrid.ablations.records.predictions import Predictions
from expertgrid.ablations.records.record import TrainingRates
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.comparison import compare
from expertgrid.ablations.results.evidence import foresee, read_evidence
from expertgrid.ablations.results.levels import marginals
from expertgrid.ablations.results.questions import study_questions
from expertgrid.ablations.results.rows import best_row, common_scores, peek, read_results, winner
from expertgrid.ablations.results.stats.contrasts import judge
from expertgrid.ablations.results.stats.race import race
from expertgrid.ablations.results.tables.cells import comparison_tables
from expertgrid.ablations.results.tables.notes import effect_notes, plan_lines
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.ablations.study.cells import groups
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.files import write_whole
from expertgrid.model.system.text import MeasuredMultiple, Multiple, render_tables, shown
from expertgrid.model.training.holdout import HoldOut

GRID = """
question = "?"
seeds = 6
margin = 1.0
[set]
width = 0.0625
epochs = 2
[factors]
experts = [2, 4]
kernel = [3, 5, 7]
"""
ONE_AT_A_TIME = """
question = "?"
design = "one_at_a_time"
seeds = 4
baselines = ["segmented"]
[set]
width = 0.0625
epochs = 2
[factors]
experts = [4, 2]
gate = ["mlp"]
"""
EFFECTS = {"3": 0.0, "5": 4.0, "7": 0.1}  # of the kernel, in points


def drawn(levels: dict, seed: int) -> tuple[float, float]:
    """Validation and test accuracy: an effect, what the seed does to all cells, and noise."""
    rng = np.random.default_rng([seed, levels.get("experts", 2), levels.get("kernel", 3), not levels])
    shared = np.random.default_rng(seed % 1_000_000).normal(0, 2)
    both = 80 + EFFECTS[str(levels.get("kernel", 3))] + shared
    return both + rng.normal(0, 0.3), both - 1 + rng.normal(0, 0.3)


def grid_of(digits, place, text: str = GRID, scores=drawn) -> StudyDirectory:
    return write_study(place / "grid", text, digits, scores)


@pytest.fixture
def grid(digits, tmp_path) -> StudyDirectory:
    return grid_of(digits, tmp_path)


@pytest.fixture
def text_of(expertgrid):
    """What `table --notes` prints of a study."""
    return lambda directory: expertgrid("table", directory.path, "--notes").out


def verdicts(evidence) -> dict[str, str]:
    return {effect.name: effect.judgement.verdict for effect in evidence.effects}


# --- Families ---


def test_main_effects_are_means_over_matched_cells(grid):
    evidence = read_evidence(grid)
    _, scores_CS, _ = common_scores(evidence.results.rows)
    scores_LMS = scores_CS.reshape(2, 3, 6)
    by_hand = {
        "experts 2 -> 4": scores_LMS[1].mean() - scores_LMS[0].mean(),
        "kernel 3 -> 5": scores_LMS[:, 1].mean() - scores_LMS[:, 0].mean(),
        "kernel 3 -> 7": scores_LMS[:, 2].mean() - scores_LMS[:, 0].mean(),
    }
    assert {effect.name: effect.judgement.mean for effect in evidence.effects} == pytest.approx(by_hand)
    assert verdicts(evidence) == {"experts 2 -> 4": "same", "kernel 3 -> 5": "better", "kernel 3 -> 7": "same"}
    for effect in evidence.effects:
        assert effect.judgement.low < by_hand[effect.name] < effect.judgement.high


def test_cells_against_the_base_have_dunnetts_constant(grid):
    evidence = read_evidence(grid)
    judgements = evidence.against_base
    assert judgements[0] is None
    constant = judgements[1].constant
    rng = np.random.default_rng(0)
    z, chi = rng.normal(size=(400_000, 6)), rng.chisquare(25, 400_000)
    largest = np.abs((z[:, 1:] - z[:, :1]) / 2**0.5).max(1) / np.sqrt(chi / 25)
    assert (largest > constant).mean() == pytest.approx(0.05, abs=0.002)
    assert [judgement.verdict for judgement in judgements[1:]].count("better") == 2


def test_interactions_are_of_four_cells_and_exploratory(digits, tmp_path, text_of):
    def extra(levels, seed):
        validation, test = drawn(levels, seed)
        return validation + 3 * (levels["experts"] == 4 and levels["kernel"] == 5), test

    directory = grid_of(digits, tmp_path, scores=extra)
    evidence = read_evidence(directory)
    scores_LMS = common_scores(evidence.results.rows)[1].reshape(2, 3, 6).mean(-1)
    (interaction,) = evidence.decided_interactions
    assert interaction.name == "experts 2 -> 4, with kernel 3 -> 5"
    adds = scores_LMS[1, 1] - scores_LMS[0, 1] - (scores_LMS[1, 0] - scores_LMS[0, 0])
    assert interaction.judgement.mean == pytest.approx(adds)
    assert "Exploratory: not declared before training." in text_of(directory)


def test_the_scores_that_decide_are_those_of_validation(digits, tmp_path, text_of):
    """A cell that is better on test alone is not better, and is not the best."""

    def scores(levels, seed):
        return 80 + 0.1 * seed, 99.0 if levels["kernel"] == 7 else 70.0

    directory = grid_of(digits, tmp_path, scores=scores)
    evidence = read_evidence(directory)
    assert set(verdicts(evidence).values()) == {"open"}
    assert best_row(evidence.results.rows) is evidence.results.rows[0]
    assert "the same amount at every seed" in text_of(directory)


def test_one_at_a_time_is_against_the_base_and_has_baselines(digits, tmp_path):
    def scores(levels, seed):
        noise = np.random.default_rng([seed, len(levels), levels.get("experts") == 2]).normal(0, 0.2)
        value = (70 if not levels else 85 if levels.get("experts") == 2 else 80) + seed + noise
        return value, value

    evidence = read_evidence(write_study(tmp_path / "s", ONE_AT_A_TIME, digits, scores))
    assert verdicts(evidence) == {"experts base -> 2": "better"}  # 4 experts and the MLP gate are the base's network
    named = [row.name for row in evidence.results.rows]
    assert named == ["experts base / 4, gate base / mlp", "experts 2, gate base", "segmented"]
    assert [judgement and judgement.verdict for judgement in evidence.against_base] == [None, "better", "worse"]
    with pytest.raises(InputError, match="experts and gate never together"):
        marginals(evidence, ["experts", "gate"])


def test_cells_that_are_one_network_count_once(digits, tmp_path):
    text = GRID.replace("[2, 4]", "[1, 2]").replace("kernel = [3, 5, 7]", 'gate = ["linear", "mlp"]')
    evidence = read_evidence(write_study(tmp_path / "s", text, digits, drawn))
    assert [row.name for row in evidence.results.rows] == [
        "experts 1", "experts 2, gate linear", "experts 2, gate mlp",
    ]  # fmt: skip
    _, scores_CS, _ = common_scores(evidence.results.rows)
    single, linear, mlp = scores_CS.mean(1)
    assert {effect.name: effect.judgement.mean for effect in evidence.effects} == pytest.approx(
        {"experts 1 -> 2": (linear + mlp) / 2 - single, "gate linear -> mlp": mlp - linear}
    )


# --- What is missing, failed, added ---


def test_a_cell_that_diverged_has_no_verdict_and_is_not_dropped(digits, tmp_path, text_of):
    def some(levels, seed):
        if levels == {"experts": 2, "kernel": 5} and seed in (1, 3):
            return "diverged"
        return drawn(levels, seed)

    directory = grid_of(digits, tmp_path, scores=some)
    evidence = read_evidence(directory)
    assert evidence.against_base[1].verdict == "none"
    assert evidence.against_base[1].reason == "diverged in 2 of 6 seeds"
    assert verdicts(evidence) == {"experts 2 -> 4": "none", "kernel 3 -> 5": "none", "kernel 3 -> 7": "same"}
    text = text_of(directory)
    assert "no verdict: diverged in 2 of 6 seeds" in text
    assert "no verdict: diverged in 2 of 36 trainings" in text
    assert "Failed: 2 of the trials (2 diverged)." in text
    assert f"Failed: {evidence.results.rows[1].trials[1]}: diverged: the loss is nan" in text
    assert "have no verdict, as trainings diverged" in answer(evidence)

    matched = [line for line in effect_notes(evidence) if "over the cells that did not diverge (exploratory)" in line]
    assert [line.split(" over")[0] for line in matched] == ["experts 2 -> 4", "kernel 3 -> 5"]
    assert ", better." in matched[1]
    more = "kernel 3 -> 5: 0 of 12 trainings diverged before, 2 of 12 after (Fisher's exact p 0.48; exploratory)."
    assert more in text  # 2 * (12 choose 2) / (24 choose 2)
    assert "kernel 3 -> 7: 0 of 12 trainings" not in text


def test_what_differs_with_a_factor_is_named(grid, text_of):
    """Of the trainings with 4 experts 10 of 18 had other code, and 8 of 18 other threads, which is not most."""
    before = read_evidence(grid)
    assert [effect.confounded for effect in before.effects] == [[], [], []]
    records = [record for row in before.results.rows[3:] for record in row.records]
    for place, trial in enumerate(record.trial for record in sorted(records, key=lambda record: record.seed)):
        environment = before.results.rows[0].records[0].environment.model_dump()
        environment |= {"commit": "other" if place < 10 else None, "threads": 2 if place < 8 else 1}
        change_json(grid.trial(trial) / "record.json", environment=environment)
    line = "Confounded, as half or more of the trainings differ in it too: experts 2 -> 4 with code."
    assert line in text_of(grid)


def test_a_spread_has_its_levels_and_parts(digits, tmp_path, text_of):
    rng, labels = np.random.default_rng(0), np.arange(400) % 10

    def noisy(levels, seed):
        return 80 + rng.normal(0, 3 if levels["kernel"] == 7 else 1), 80.0

    directory = grid_of(digits, tmp_path, scores=noisy)
    evidence = read_evidence(directory)
    squares = np.square(evidence.spread_by_level)  # before and after: experts, kernel 3 and 5, 3 and 7
    assert (squares[:2].mean(), squares[[2, 3, 5]].mean()) == pytest.approx((evidence.spread**2, evidence.spread**2))
    assert squares[5] > 2 * squares[2:4].max()
    assert evidence.images_share is None
    assert re.search(r"Spread after cell and seed: \S+ points, by level \S+ to \S+\.\n", text_of(directory))
    right_CB = rng.random((6, 400)) < 0.8
    for row, right_B in zip(evidence.results.rows, right_CB):
        predicted = np.where(right_B, labels, (labels + 1) % 10)
        predictions = Predictions(predicted, labels, predicted, labels)
        write_whole(directory.trial(row.records[0].trial) / "predictions.npz", predictions.to_bytes())
    evidence = read_evidence(directory)
    of_images = 100 * (0.8 * 0.2 / 400) ** 0.5  # networks that are right on any image by chance
    assert evidence.images_share == pytest.approx(min(1, (of_images / evidence.spread) ** 2), rel=0.15)
    line = r"Its square: (\d+)% from few images .*, (\d+)% from effects .*, (\d+)% from training"
    parts = re.search(line, text_of(directory))
    assert sum(map(int, parts.groups())) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(("seeds", "known"), [(1, 0), (2, 0), (3, 3)])
def test_too_few_seeds_of_two_cells_have_no_interval(digits, tmp_path, seeds, known):
    evidence = read_evidence(grid_of(digits, tmp_path, GRID.replace("seeds = 6", f"seeds = {seeds}")))
    against = evidence.against_base[1:]
    assert sum(judgement.low is not None for judgement in against) == (5 if known else 0)
    assert {judgement.reason for judgement in against if judgement.low is None} <= {
        f"{seeds} seed{'s' * (seeds > 1)}: no verdict"
    }


def test_a_training_that_was_lost_is_a_gap(digits, tmp_path):
    def some(levels, seed):
        return "crashed" if levels == {"experts": 2, "kernel": 5} and seed == 1 else drawn(levels, seed)

    evidence = read_evidence(grid_of(digits, tmp_path, scores=some))
    assert verdicts(evidence) == verdicts(read_evidence(grid_of(digits, tmp_path / "whole")))
    assert all(5 < effect.judgement.seeds < 6 for effect in evidence.effects if effect.name != "kernel 3 -> 7")


def test_what_is_the_same_on_average_may_depend_on_another_factor(digits, tmp_path):
    def crossed(levels, seed):
        both = drawn(levels | {"kernel": 3}, seed)
        change = {5: 0, 7: 2 if levels["experts"] == 4 else -2}.get(levels["kernel"], 0)
        return both[0] + change, both[1] + change

    evidence = read_evidence(grid_of(digits, tmp_path, scores=crossed))
    line = next(
        line for line in effect_notes(evidence) if "kernel 3 -> 7 is same on average, and depends on experts" in line
    )
    assert re.fullmatch(r".*\(exploratory\): \S+ \(.*\) at 2; \+2\S+ \(.*\) at 4\.", line)


def test_an_unfinished_study_says_so(digits, tmp_path, text_of):
    def half(levels, seed):
        return None if levels == {"experts": 4, "kernel": 7} and seed > 3 else drawn(levels, seed)

    directory = grid_of(digits, tmp_path, scores=half)
    text = text_of(directory)
    seeds = [effect.judgement.seeds for effect in read_evidence(directory).effects]
    assert min(seeds) > 5 and max(seeds) == 6  # two of 36 trials are missing
    assert "more than 1 such table in 20 may hold a wrong verdict" in text
    assert "4/6" in text
    assert "at most 1 such table" not in text


def test_of_one_seed_nothing_is_decided(digits, tmp_path, text_of):
    directory = grid_of(digits, tmp_path, GRID.replace("seeds = 6", "seeds = 1"))
    text = text_of(directory)
    assert set(verdicts(read_evidence(directory)).values()) == {"open"}
    assert "1 seed: no verdict" in text
    assert "at most 1 such table" not in text


def test_the_1_in_20_stands_where_it_holds(digits, tmp_path, text_of):
    line = "If this study were repeated with new seeds, on images that no network of it has trained on, at most 1 such"
    directory = grid_of(digits, tmp_path, GRID.replace("seeds = 6", "seeds = 3"))
    assert line in text_of(directory)
    grid_of(digits, tmp_path)  # the same directory with six seeds
    text = text_of(directory)
    assert line not in text
    assert "Seeds were added after results were seen, so more than 1 such table in 20 may hold" in text


def test_seeds_that_were_seen_elsewhere_are_noticed(digits, tmp_path, text_of):
    pair = GRID.replace("experts = [2, 4]", "").replace("5, 7]", "5]")
    write_study(tmp_path / "first", pair.replace("seeds = 6", "seeds = 3"), digits, drawn)
    more = write_study(tmp_path / "more", pair, digits, drawn)
    assert more.read_plan().seen == [0, 1, 2]
    assert "Seeds were added after results were seen" in text_of(more)
    other = write_study(tmp_path / "other", pair.replace("5]", "7]"), digits, drawn)
    assert other.read_plan().seen == [0, 1, 2, 3, 4, 5]
    note = "Results of these seeds were seen before the study was made, so more than 1 such table in 20"
    assert note in text_of(other)
    fresh = write_study(tmp_path / "fresh", f"first_seed = 6\n{pair}", digits, drawn)
    assert fresh.read_plan().seen == []
    assert "at most 1 such table in 20" in text_of(fresh)
    again = write_study(tmp_path / "copy", f"first_seed = 6\n{pair}", digits, drawn)  # the very same study
    assert again.read_plan().seen == []


def test_a_fixed_split_is_said_with_every_verdict(digits, tmp_path, text_of):
    directory = grid_of(digits, tmp_path, GRID + '[base]\nhold_out = "fixed"\n')
    text = text_of(directory)
    assert "6 seeds, all on the same tenth of the images" in text
    assert "better (this split)" in text
    assert "new seeds on this split of the images, at most 1 such table" in text
    assert answer(read_evidence(directory)).startswith("On this split of the images: ")


def test_a_control_should_come_out_the_same(digits, tmp_path):
    directory = grid_of(digits, tmp_path, f"control = true\n{GRID}")
    evidence = read_evidence(directory)
    row = evidence.results.rows[-1]
    assert (row.name, list(row.trials), evidence.against_base[-1].verdict) == ("base again", [*range(6)], "same")
    trial, labels = directory.config(row.trials[2]), np.arange(500) % 10
    assert trial.seed == 1_000_002
    of_base = directory.read_plan().hold_out.held_out(labels, "f", 2)
    assert trial.hold_out.held_out(labels, "f", trial.seed).tolist() == of_base.tolist()
    assert best_row([row, *evidence.results.rows[1:]]) is not row


# --- The words ---


def test_the_first_table_is_what_each_factor_does(grid, text_of):
    lines = text_of(grid).splitlines()
    title = "What each factor does (validation accuracy, points; 6 seeds, each on its own tenth of the images)"
    assert lines[0] == title
    assert re.split(r"\s{2,}", lines[2]) == [
        "factor", "change", "effect", "95% interval", "verdict", "parameters", "MACs", "training time",
    ]  # fmt: skip
    five = next(effect.judgement for effect in read_evidence(grid).effects if effect.name == "kernel 3 -> 5")
    interval = rf"\{five.low:+.2f} to \{five.high:+.2f}"
    assert re.match(rf"kernel +3 -> 5 +\{five.mean:+.2f} +{interval} +better +x1.0", lines[5])
    assert any(line.startswith("This study can tell effects from 0 from about 0.") for line in lines)


@pytest.mark.parametrize(
    ("second", "fourth", "sentence"),
    [
        (
            84.0, 84.0,
            "A second expert adds 4.0 points and doubles the MACs; going from 1 to 4 experts adds 4.0 points for 4.0 "
            "times the MACs.",
        ),
        (
            80.0, 76.0,
            "Going from 1 to 4 experts loses 4.0 points for 4.0 times the MACs; a second expert (2.0 times the MACs) "
            "changes less than 1 point.",
        ),
    ],
)  # fmt: skip
def test_the_answer_is_of_verdicts_and_costs(digits, tmp_path, second, fourth, sentence):
    def of_experts(levels, seed):
        value = {1: 80.0, 2: second, 4: fourth}[levels["experts"]]
        return value + np.random.default_rng([seed, levels["experts"]]).normal(0, 0.02), 80.0

    study = GRID.replace("experts = [2, 4]", "experts = [1, 2, 4]").replace("kernel = [3, 5, 7]", "")
    directory = write_study(tmp_path / "s", study, digits, of_experts)
    for file in directory.path.glob("trials/*/record.json"):  # costs of so many experts
        experts = len(next(iter(directory.config(file.parent.name).model.blocks())).kernels)
        change_json(file, macs=100 * experts)
    assert answer(read_evidence(directory)) == sentence


def test_open_effects_say_how_many_seeds_would_show(digits, tmp_path):
    evidence = read_evidence(grid_of(digits, tmp_path, GRID.replace("margin = 1.0", "margin = 0.05")))
    needed = [effect.seeds_to_decide for effect in evidence.effects if effect.judgement.verdict == "open"]
    assert needed
    assert all(seeds is None or seeds > 6 for seeds in needed)
    assert "is not decided" in answer(evidence)


def kernel_of(directory: StudyDirectory, trial: str) -> int:
    return next(iter(directory.config(trial).model.blocks())).kernels[0]


def cost_of_five(directory: StudyDirectory) -> dict[str, Multiple | MeasuredMultiple]:
    """The cost of kernel 5 instead of 3, over two pairs of cells."""
    return next(effect.cost for effect in read_evidence(directory).effects if effect.name == "kernel 3 -> 5")


def test_costs_are_ratios_over_matched_cells_measured_alike(grid):
    for file in grid.path.glob("trials/*/record.json"):
        kernel, seed = kernel_of(grid, file.parent.name), grid.record(file.parent.name).seed
        change_json(file, macs=kernel**2, train_seconds=float(kernel) ** (1 + (kernel == 5) * seed / 100))
    cost = cost_of_five(grid)
    assert (cost["parameters"], cost["MACs"]) == pytest.approx((1, 25 / 9))
    logs = np.log(5 ** (1 + np.arange(6) / 100) / 3)  # the ratio of times at each seed
    t = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert cost["training time"] == pytest.approx((np.exp(logs.mean()), np.exp(t.low), np.exp(t.high)))
    first = read_results(grid).rows[0].records[0]
    environment = first.environment.model_dump() | {"device": "another"}
    change_json(grid.trial(first.trial) / "record.json", environment=environment)
    assert "training time" not in cost_of_five(grid)


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        ([0.98, 1.0, 1.02], "x1.67 (1.59 to 1.75)"),
        ([1.0, 0.9, 11.0], "can't tell"),  # one round of the three was ten times as fast
        ([1.0], "can't tell"),
        ([], "can't tell"),
    ],
)
def test_a_ratio_of_training_times_has_an_interval_over_rounds_or_cannot_be_told(grid, rounds, text):
    rates, every = {}, {}
    for row in read_results(grid).rows:
        kernel = kernel_of(grid, row.trials[0])
        rates[row.trials[0]] = 100 / kernel
        every[row.trials[0]] = [100 / kernel * (factor if kernel == 5 else 1) for factor in rounds]
    about = {"device": "d", "threads": 1, "bfloat16": False, "torch": "", "finished": ""}
    grid.write_training_rates(TrainingRates(**about, images_per_s=rates, rounds=every if rounds else {}))
    assert [row.alone for row in read_results(grid).rows] == list(rates.values())
    ratio = cost_of_five(grid)["training time"]
    assert shown(ratio) == text
    if len(rounds) != 3:
        assert ratio == (pytest.approx(5 / 3), None, None)


def test_a_latency_ratio_is_between_the_ends_of_both_intervals(grid):
    for row in read_results(grid).rows:
        kernel = kernel_of(grid, row.trials[0])
        write_latency(grid.path, row.trials[0], kernel, interval_ms=(0.9 * kernel, 1.2 * kernel))
    assert cost_of_five(grid)["latency"] == pytest.approx((5 / 3, 5 / 3 * 0.9 / 1.2, 5 / 3 * 1.2 / 0.9))
    assert "points for 1.7 (1.3 to 2.2) times the latency; going" in answer(read_evidence(grid))


def test_what_was_taken_over_has_no_times(grid, digits, tmp_path):
    other = write_study(tmp_path / "other", GRID, digits, lambda levels, seed: None)
    trial = read_results(other).rows[0].trials[0]
    write_whole(other.trial(trial) / "adopted.json", b'{"directory": "grid", "time": ""}')
    write_whole(other.trial(trial) / "record.json", (grid.trial(trial) / "record.json").read_bytes())
    assert read_results(other).rows[0].adopted[trial].directory == "grid"


# --- Planning ---


def test_a_plan_goes_by_the_records(digits, grid, tmp_path):
    study = parse_study(GRID, tmp_path / "grid.toml")
    names = [cell.planned for cell in study.cells(digits)]
    before = foresee(study, names, HoldOut(), StudyDirectory(tmp_path / "nothing"))
    assert (before.spread, before.needed) == (None, {})
    after = foresee(study, names, HoldOut(), grid)
    assert after.spread == pytest.approx(0.3, rel=0.35)
    assert after.needed[1.0] < after.needed[0.5] < after.needed[0.3] == np.inf
    assert foresee(study, names, HoldOut(share=0.05), grid).needed[0.3] in range(11, 21)
    assert after.smallest == pytest.approx(before.smallest * after.spread, rel=1e-3)
    assert f"where scores of a cell spread by {1 / before.smallest:.2g} points" in plan_lines(before, margin=1.0)[0]
    (line,) = plan_lines(after, images_again="images again")
    assert line.startswith("With 6 seeds this study can tell effects from 0 from about ")
    needed = r"0.3 points: more than 10 seeds; 0.5 points: about \d seeds; 1 points: about \d seeds; images again\."
    assert re.search(f"Seeds that a difference needs: {needed}", line)


def test_plans_and_claims_stop_where_images_come_again(digits, tmp_path, text_of):
    """Ten tenths, or two halves, are all images; seeds 7 to 12 are of two partitions."""
    fine = GRID.replace("margin = 1.0", "margin = 0.05")
    directory = grid_of(digits, tmp_path, fine)
    assert "more than 10 seeds would decide" in answer(read_evidence(directory))
    text = text_of(directory)
    assert "10 seeds hold out all images once, and more seeds the same again; digits@0.05 has 20 parts." in text
    assert "each on its own tenth of the images" in text

    crossing = text_of(write_study(tmp_path / "crossing", f"first_seed = 7\n{fine}", digits, drawn))
    assert "6 seeds, each on one tenth of the images, with overlaps" in crossing
    halves = text_of(write_study(tmp_path / "halves", fine, replace(digits, source="digits@0.5"), drawn))
    assert "6 seeds, each on one half of the images, with overlaps" in halves
    assert "hold out all images once" not in halves  # and plans have no such end
    for text in (crossing, halves):
        assert "repeated with new seeds on these images, at most 1 such table" in text


def test_a_directory_keeps_its_number_of_seeds(digits, tmp_path):
    three, none = GRID.replace("seeds = 6", "seeds = 3"), GRID.replace("seeds = 6", "")
    directory = grid_of(digits, tmp_path, three)
    study = parse_study(none, directory.path.with_suffix(".toml"))

    def seeds(given: int | None, out, asked=study) -> int:
        return read_request(asked, given, None, None, {}, out, None, None).study.seeds

    assert (seeds(None, tmp_path / "new"), seeds(None, directory.path), seeds(4, directory.path)) == (5, 3, 4)
    assert seeds(None, directory.path, parse_study(GRID, directory.path.with_suffix(".toml"))) == 6


def test_what_a_study_can_see_is_found_by_simulation(digits, tmp_path):
    """Of studies whose largest effect is as large as the plan can see, four of five find it."""
    study = parse_study(GRID, tmp_path / "grid.toml")
    names = [cell.planned for cell in study.cells(digits)]
    sight = foresee(study, names, HoldOut(), StudyDirectory(tmp_path / "nothing"))
    weights_QU = study_questions(study, groups(names, study.combined_levels)).effect_weights_QU
    hardest = int((weights_QU**2).sum(1).argmax())
    direction_U = weights_QU[hardest] / (weights_QU[hardest] ** 2).sum()
    rng, decided = np.random.default_rng(0), 0
    for _ in range(300):
        scores_US = 80 + sight.smallest * direction_U[:, None] + rng.normal(0, 1, (6, 6))
        decided += judge(weights_QU, scores_US, 0.01)[hardest].verdict == "better"
    assert decided / 300 == pytest.approx(0.8, abs=0.08)


# --- Two cells ---

FIRST, SECOND = "experts=2,kernel=5", "experts=2,kernel=3"


def test_a_contrast_in_full(grid, expertgrid):
    rows = read_results(grid).rows
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=360)
    for row in rows[:2]:
        for record in row.records:
            predicted = np.where(rng.random(360) < 0.8, labels, (labels + 1) % 10)
            predictions = Predictions(labels[:144], labels[:144], predicted, labels)
            write_whole(grid.trial(record.trial) / "predictions.npz", predictions.to_bytes())
    evidence = read_evidence(grid)
    two = compare(grid, evidence, 1, 0)
    _, validation_CS, test_CS = common_scores(evidence.results.rows)
    weights_1U = np.array([[-1.0, 1, 0, 0, 0, 0]])
    alone = judge(weights_1U, validation_CS, 1.0)[0]
    assert two.comparison.judgement == alone
    assert alone.constant == pytest.approx(scipy.stats.t.ppf(0.975, 25), rel=1e-4)
    assert two.comparison.test.mean == pytest.approx((test_CS[1] - test_CS[0]).mean())
    splits, seeds = comparison_tables(evidence, two)
    for seed, row in enumerate(seeds.rows):
        predictions = [grid.predictions(rows[place].trials[seed]) for place in (1, 0)]
        right = [of_trial.test == labels for of_trial in predictions]
        only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
        assert [row["only A right"], row["only B right"]] == only
        assert row["McNemar p"] == pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue)
        assert row["val A - B"] == pytest.approx(validation_CS[1, seed] - validation_CS[0, seed])
    note = "Chosen after seeing the table: read this as a suggestion and test it on new seeds (--first-seed 6)."
    assert note in expertgrid("table", grid.path, "--contrast", FIRST, SECOND).out
    again = json.loads(expertgrid("table", grid.path, "--contrast", FIRST, SECOND, "--format", "json").out)
    assert again["splits"][0]["verdict"]["mean"] == pytest.approx(alone.mean)
    assert "No McNemar test" in expertgrid("table", grid.path, "--contrast", "experts=4,kernel=5", SECOND).out


def test_a_declared_contrast_is_of_its_family_either_way_round(digits, tmp_path, expertgrid, text_of):
    pairs = [[FIRST, SECOND], ["experts 4, kernel 7", "experts 4, kernel 3"]]
    directory = grid_of(digits, tmp_path, f"contrasts = {json.dumps(pairs)}\n{GRID}")
    evidence = read_evidence(directory)
    _, scores_CS, _ = common_scores(evidence.results.rows)
    family = judge(np.array([[-1.0, 1, 0, 0, 0, 0], [0, 0, 0, -1, 0, 1]]), scores_CS, 1.0)
    assert [comparison.judgement for comparison in evidence.declared] == family
    assert "Contrasts that the study declares" in text_of(directory)
    forth = compare(directory, evidence, 1, 0).comparison
    back = compare(directory, evidence, 0, 1).comparison
    assert (forth.judgement, forth.declared, back.declared) == (family[0], True, True)
    assert (back.judgement.mean, back.judgement.low) == (-forth.judgement.mean, -forth.judgement.high)
    assert (forth.judgement.verdict, back.judgement.verdict) == ("better", "worse")
    assert "Chosen after seeing" not in expertgrid("table", directory.path, "--contrast", FIRST, SECOND).out


# --- By factor, by epoch ---


def test_levels_have_their_means_and_their_main_effect(grid, expertgrid):
    evidence = read_evidence(grid)
    _, scores_CS, test_CS = common_scores(evidence.results.rows)
    three, five, seven = marginals(evidence, ["kernel"])
    assert three.effect is None
    assert (five.effect, seven.effect) == tuple(evidence.effects[1:])
    by_seed = scores_CS.reshape(2, 3, 6)[:, 2].mean(0)
    assert seven.validation.mean == pytest.approx(by_seed.mean())
    assert seven.test.mean == pytest.approx(test_CS.reshape(2, 3, 6)[:, 2].mean())
    both = {tuple(marginal.levels.values()): marginal.effect for marginal in marginals(evidence, ["kernel", "experts"])}
    assert both["3", "2"] is both["5", "2"] is both["3", "4"] is None
    assert both["5", "4"] in evidence.interactions
    assert "one of the study's main effects" in expertgrid("table", grid.path, "--by", "kernel").out
    assert "Exploratory: not declared." in expertgrid("table", grid.path, "--by", "kernel,experts").out


def test_peeking_is_of_the_validation_curves(expertgrid, digits, tmp_path):
    directory = grid_of(digits, tmp_path, GRID.replace("seeds = 6", "seeds = 2"))
    curves = {0: [70.0, 60.0], 1: [50.0, 75.0]}
    for row in read_results(directory).rows:
        for record in row.records:
            written_epochs(directory, record.trial, curves[record.seed])
    peeked = peek(directory, read_results(directory).rows[0])
    assert (peeked.last, peeked.best_epoch, peeked.best, peeked.gain) == pytest.approx((67.5, 72.5, 75.0, 7.5))
    outcome = expertgrid("table", directory.path, "--peek")
    assert re.search(r"experts 2, kernel 3 +2 +67.50 +72.50 +75.00 +7.50", outcome.out)
    assert "So these are curves of the validation split" in outcome.out
    file = next(directory.path.glob("trials/*/epochs.jsonl"))
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert "epochs.jsonl: has 1 epochs, the trial has 2" in expertgrid("table", directory.path, "--peek").complaint


def test_the_winner_is_corrected_for_selection(digits, tmp_path, text_of):
    """Equal cells: the best on validation looks good on test by its seeds, and on the seed left out it does not."""
    rng = np.random.default_rng(0)
    luck = {}

    def equal(levels, seed):
        both = luck.setdefault((str(levels), seed), rng.normal(80, 2))
        return both + rng.normal(0, 0.1), both + rng.normal(0, 0.1)

    directory = grid_of(digits, tmp_path, scores=equal)
    rows = read_results(directory).rows
    best = winner(rows)
    _, validation_CS, test_CS = common_scores(rows)
    chosen = [np.delete(validation_CS, seed, 1).mean(1).argmax() for seed in range(6)]
    corrected = np.mean([test_CS[cell, seed] for seed, cell in enumerate(chosen)])
    assert best.corrected.mean == pytest.approx(corrected)
    assert best.reported.mean == pytest.approx(best_row(rows).mean("test"))
    assert f"Corrected for selection as the best of 6: {corrected:.2f} (" in text_of(directory)


# --- Names, formats, wrong input ---


def test_cells_are_found_by_name_and_by_levels(grid, digits, tmp_path):
    results = read_results(grid)
    for text in ("experts 4, kernel 5", "experts=4,kernel=5", "kernel=5 experts=4", "kernel 5, experts 4"):
        assert results.row(text) == 4
    with pytest.raises(InputError, match=r"cell 'experts=4' is 3 cells: experts 4, kernel 3; "):
        results.row("experts=4")
    for text in ("experts=8,kernel=3", "mlp", "", "experts"):
        with pytest.raises(InputError, match=r"unknown cell .* Accepted: experts 2, kernel 3, experts 2, kernel 5"):
            results.row(text)
    text = GRID.replace("[2, 4]", "[1, 2]").replace("kernel = [3, 5, 7]", 'gate = ["linear", "mlp"]')
    shared = read_results(write_study(tmp_path / "s", text, digits, lambda levels, seed: (80.0, 80.0)))
    assert shared.row("experts=1,gate=mlp") == shared.row("experts=1") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contrast", SECOND, "kernel=9"], "unknown cell 'kernel=9'"),
        (["--contrast", "experts=2", "experts=4"], "cell 'experts=2' is 3 cells"),
        (["--contrast", SECOND, "experts 2, kernel 3"], "is one cell"),
        (["--contrast", "experts=2"], "Option '--contrast' requires 2 arguments"),
        (["--by", "experts", "--peek"], "--by, --contrast and --peek are different tables"),
        (["--by", "experts,kernels"], "unknown factor of .*: 'kernels'; did you mean 'kernel'?"),
        (["--by", "experts,experts"], "one factor, or two different ones"),
    ],
)
def test_wrong_questions_are_one_line(expertgrid, grid, arguments, message):
    outcome = expertgrid("table", grid.path, *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert re.search(message, outcome.complaint)


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        ([["kernel=9", SECOND]], "contrasts: unknown cell 'kernel=9'"),
        ([["experts=2", SECOND]], "contrasts: cell 'experts=2' is 3 cells"),
        ([[SECOND, "experts 2, kernel 3"]], "are the same cell"),
        ([[FIRST, SECOND], [SECOND, "kernel 5, experts 2"]], "are declared twice, first as 'experts=2,kernel=5'"),
    ],
)
def test_contrasts_that_cannot_be_declared(digits, tmp_path, contrasts, message):
    with pytest.raises(InputError, match=message):
        grid_of(digits, tmp_path, f"contrasts = {json.dumps(contrasts)}\n{GRID}")
    assert not (tmp_path / "grid").exists()


def test_what_is_declared_cannot_be_changed_after_results(expertgrid, grid, digits):
    toml = (grid.path / "study.toml").read_text()
    (grid.path / "study.toml").write_text(toml.replace("margin = 1.0", "margin = 3.0"))
    assert "margin was 1.0 when the study was begun, study.toml has 3.0" in expertgrid("table", grid.path).complaint
    (grid.path / "study.toml").write_text(toml)
    grid.enter_test_read("abc", "training", 1)
    with pytest.raises(InputError, match="the study now has more levels of kernel: 9; what is compared is declared"):
        grid.check_holds(parse_study(GRID.replace("7]", "7, 9]"), grid.path.with_suffix(".toml")))


def test_records_of_another_hold_out_are_named(expertgrid, grid):
    file = grid.trial(read_results(grid).rows[1].trials[3]) / "config.json"
    for kind, share in (("fixed", 0.1), ("rotating", 0.2)):
        change_json(file, hold_out={"kind": kind, "share": share})
        outcome = expertgrid("table", grid.path)
        assert outcome.status == 2
        assert f"{file}: its hold-out is " in outcome.complaint
        assert "the records of one directory need the same hold-out" in outcome.complaint


def test_a_verdict_in_csv_and_json_has_its_numbers(grid):
    evidence = read_evidence(grid)
    shown = study_tables(grid, evidence)
    rows = json.loads(render_tables(shown, "json"))
    assert list(rows) == ["schema", "trained", "factors", "cells"]
    flat = list(csv.DictReader(io.StringIO(render_tables(shown, "csv"))))
    for effect, row, line in zip(evidence.effects, rows["factors"], flat):
        assert row["effect"] == row["verdict"]["mean"] == effect.judgement.mean == float(line["effect"])
        assert row["95% interval"] == {"low": effect.judgement.low, "high": effect.judgement.high}
        assert float(line["95% interval low"]) == effect.judgement.low
        assert row["verdict"]["verdict"] == line["verdict"] == effect.judgement.verdict
        assert row["verdict"]["ruled_out_above"] == max(-effect.judgement.low, effect.judgement.high)


# --- Races ---


def test_a_race_has_the_verdicts_of_a_race(grid, tmp_path, text_of):
    evidence = read_evidence(grid)
    _, scores_CS, _ = common_scores(evidence.results.rows)
    plan = RaceRules(alpha=0.05, margin=1.0, first=4, last=6, contrasts=3)
    write_whole(grid.path / "plan.json", Plan(**{**dict(grid.read_plan()), "race": plan}).model_dump_json().encode())
    raced = read_evidence(grid)
    oracle = race(evidence.questions.effect_weights_QU, scores_CS, 1.0, 6, 4)
    assert [effect.judgement for effect in raced.effects] == oracle.judgements
    assert all(effect.seeds_to_decide is None for effect in raced.effects)
    assert raced.against_base == [None] * 6
    assert "a race from 4 to 6 seeds" in text_of(grid)
    judgement = compare(grid, raced, 1, 2).comparison.judgement
    assert (judgement.verdict, judgement.reason[:26]) == ("none", "seeds were added by a race")

"""Races: who gets another seed, that they go on after an interruption, and what their tables say."""

import re

import numpy as np
import pytest
from conftest import written_record

from ablations.engines import TrialDone, TrialFailed
from ablations.records import Failure, Record, StudyDirectory
from ablations.results import evidence, stats
from model.files import write_whole

STUDY = """
question = "Which kernel?"
seeds = 3
margin = 1.0
[set]
width = 0.0625
epochs = 2
[factors]
kernel = [3, 5, 7, 9]
"""
RACE = ["--until", "decided", "--max-seeds", 8, "--device", "cpu"]
EFFECTS = {3: 0.0, 5: 5.0, 7: 0.0, 9: 1.1}  # in points: clear, none, and hard to tell
SPREADS = {3: 0.0, 5: 0.3, 7: 0.15, 9: 1.5}


def drawn(kernel: int, seed: int) -> float:
    shared, own = (np.random.default_rng(key).normal() for key in (seed, [seed, kernel]))
    return 80 + EFFECTS[kernel] + shared + SPREADS[kernel] * own


class Engine:
    """In the place of `run_local`: leaves records at once, or fails, or is interrupted before a trial."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, int]] = []
        self.interrupt_after = self.fails = None

    def __call__(self, trials, data, directory, execution):
        for trial in trials:
            kernel = next(iter(trial.model.blocks())).kernels[0]
            if len(self.trained) == self.interrupt_after:
                raise KeyboardInterrupt
            self.trained.append((kernel, trial.seed))
            directory.write_config(trial)
            if (kernel, trial.seed) == self.fails:
                directory.write_failure(trial.id, Failure(kind="diverged", error="loss", traceback="", time=""))
                yield TrialFailed(trial, "diverged")
                continue
            text = written_record(trial, drawn(kernel, trial.seed), drawn(kernel, trial.seed))
            write_whole(directory.trial(trial.id) / "record.json", text.encode())
            yield TrialDone(trial, Record.model_validate_json(text))


@pytest.fixture
def engine(monkeypatch, tmp_path) -> Engine:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(STUDY)
    engine = Engine()
    monkeypatch.setattr("ablations.cli.run.run_local", engine)
    return engine


def seeds_of(directory: StudyDirectory) -> list[int]:
    return [len(cell.trials) for cell in directory.plan.cells]


def expected() -> list[stats.Race]:
    """Where each race ends, from the differences alone."""
    found = []
    for kernel in (5, 7, 9):
        for count in range(3, 9):
            one = stats.race([drawn(kernel, seed) - drawn(3, seed) for seed in range(count)], 8, 1.0, 3, 0.05, 3)
            if not one.go_on:
                break
        found.append(one)
    return found


def test_seeds_go_to_what_is_undecided(expertgrid, engine, tmp_path):
    outcome = expertgrid("run", "s.toml", *RACE)
    assert outcome.status == 0, outcome.err
    directory, races = StudyDirectory(tmp_path / "runs" / "s"), expected()
    assert [one.verdict for one in races] == ["better", "equivalent", "undecided"]
    assert seeds_of(directory) == [8, *(one.seeds for one in races)]
    assert races[0].seeds == 3 < races[1].seeds < 8
    assert len(engine.trained) == sum(seeds_of(directory)) == len(set(engine.trained))
    rows = evidence.study_rows(directory)
    judgements = evidence.judge(rows, 9.0, directory.plan.race)[1:]
    assert [(one.verdict, one.seeds) for one in judgements] == [(one.verdict, one.seeds) for one in races]
    assert [one.low for one in judgements] == pytest.approx([one.low for one in races], abs=1e-6)
    assert directory.plan.race.model_dump() == {
        "alpha": 0.05, "margin": 1.0, "first": 3, "last": 8, "contrasts": 3, "seen": 0,
    }  # fmt: skip
    assert (
        "look at 3 seeds, against kernel 3:\n  better, at 3 seeds: kernel 5\n  go on: kernel 7; kernel 9" in outcome.err
    )
    assert "by a race of 3 to 8 seeds with a look after each" in outcome.out
    assert "No verdict on kernel 9: the race ended at its last seed, 8." in outcome.out
    assert re.search(r"^5 +3 .* better +", outcome.out, re.MULTILINE)

    again = expertgrid("run", "s.toml", *RACE)
    assert again.out == outcome.out
    assert len(engine.trained) == sum(seeds_of(directory))


@pytest.mark.parametrize("trained", [0, 5, 13, 19])
def test_an_interrupted_race_ends_as_if_it_had_not_been(expertgrid, engine, tmp_path, trained):
    engine.interrupt_after = trained
    assert expertgrid("run", "s.toml", *RACE).status == 130
    directory = StudyDirectory(tmp_path / "runs" / "s")
    if trained >= 12:  # whichever row was being trained, the clear one is the best
        assert evidence.row_name(evidence.best_row(evidence.study_rows(directory))) == "kernel 5"
    engine.interrupt_after = None
    outcome = expertgrid("run", "s.toml", *RACE)
    assert outcome.status == 0
    assert seeds_of(directory) == [8, *(one.seeds for one in expected())]
    assert len(engine.trained) == len(set(engine.trained))


def test_a_failed_trial_ends_its_contrast_and_no_other(expertgrid, engine, tmp_path):
    engine.fails = (9, 3)
    outcome = expertgrid("run", "s.toml", *RACE)
    assert outcome.status == 1
    directory, races = StudyDirectory(tmp_path / "runs" / "s"), expected()
    assert seeds_of(directory) == [max(4, races[1].seeds), races[0].seeds, races[1].seeds, 4]
    failed = directory.plan.cells[3].trials[3]
    assert f"No verdict on kernel 9: the race may go on; failed: {failed} (diverged)." in outcome.out
    assert "Failed: 1 of the trials (1 diverged)." in outcome.out


def test_a_race_can_be_no_other_than_it_was(expertgrid, engine, tmp_path):
    expertgrid("run", "s.toml", *RACE)
    before = (tmp_path / "runs" / "s" / "plan.json").read_bytes()
    for arguments, message in [
        ([], "--out runs/s: holds a race; go on with --until decided --max-seeds 8"),
        (["--until", "decided", "--max-seeds", 9], "--max-seeds was 8 when this race was begun, and cannot be 9 now"),
        ([*RACE, "--seeds", 4], "--seeds was 3 when this race was begun, and cannot be 4 now"),
    ]:
        assert message in expertgrid("run", "s.toml", *arguments).complaint
    (tmp_path / "s.toml").write_text(STUDY.replace("9]", "9, 11]"))
    complaint = expertgrid("run", "s.toml", *RACE).complaint
    assert "the number of contrasts was 3 when this race was begun, and cannot be 4 now" in complaint
    (tmp_path / "s.toml").write_text(STUDY.replace("margin = 1.0", "margin = 2.0"))
    assert "holds another study" in expertgrid("run", "s.toml", *RACE).complaint
    assert (tmp_path / "runs" / "s" / "plan.json").read_bytes() == before


def test_a_race_after_results_were_seen_says_so(expertgrid, engine):
    expertgrid("run", "s.toml", "--device", "cpu")
    outcome = expertgrid("run", "s.toml", *RACE)
    assert "The race was begun when the results of 12 trials were there to be seen." in outcome.out


def test_dry_run_says_the_most_it_can_cost(expertgrid, engine, tmp_path):
    outcome = expertgrid("run", "s.toml", *RACE, "--dry-run")
    assert "A race: 12 of them at least, for the first look at 3 seeds, and at most all 32" in outcome.out
    assert (engine.trained, (tmp_path / "runs").exists()) == ([], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--until", "decided"], "--until decided: --max-seeds N is needed"),
        (["--max-seeds", 5], "--max-seeds 5: goes with --until decided"),
        (["--until", "done", "--max-seeds", 5], "--until 'done': unknown. Accepted: decided"),
        (["--until", "decided", "--max-seeds", 3], "--max-seeds 3: from 4 (the first look is at 3) to 100"),
        (["--until", "decided", "--max-seeds", 101], "--max-seeds 101: from 4"),
        (["--until", "decided", "--max-seeds", 9, "--seeds", 1], "--seeds 2 or more are needed for the first look"),
    ],
)
def test_options_that_make_no_race_are_one_line(expertgrid, engine, tmp_path, arguments, message):
    outcome = expertgrid("run", "s.toml", *arguments)
    assert (outcome.status, engine.trained, (tmp_path / "runs").exists()) == (2, [], False)
    assert message in outcome.complaint


def test_a_single_network_cannot_race(expertgrid, engine, tmp_path):
    (tmp_path / "s.toml").write_text(STUDY.replace("[3, 5, 7, 9]", "[3]"))
    assert "nothing to compare it with" in expertgrid("run", "s.toml", *RACE).complaint

"""Races: who gets another seed, that they go on after an interruption, and what their tables say."""

import re

import numpy as np
import pytest
from conftest import written_record

from expertgrid.ablations.engines.events import TrialDone, TrialFailed
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Failure, Record
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.rows import best_row, read_results
from expertgrid.model.system.files import write_whole

STUDY = """
question = "Which kernel?"
seeds = 4
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

    def __call__(self, trials, data, directory, execution, stop):
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
    monkeypatch.setattr("expertgrid.ablations.cli.run.run_local", engine)
    return engine


def seeds_of(directory: StudyDirectory) -> list[int]:
    return [len(cell.trials) for cell in directory.read_plan().cells]


def test_seeds_go_to_what_is_undecided(expertgrid, engine, tmp_path):
    outcome = expertgrid("run", "s.toml", *RACE)
    assert outcome.status == 0, outcome.err
    directory = StudyDirectory(tmp_path / "runs" / "s")
    assert seeds_of(directory) == [8, 4, 8, 8]  # the clear contrast ends at the first look
    assert len(engine.trained) == sum(seeds_of(directory)) == len(set(engine.trained))
    judgements = {effect.name: effect.judgement for effect in read_evidence(directory).effects}
    assert {name: (judged.verdict, judged.seeds) for name, judged in judgements.items()} == {
        "kernel 3 -> 5": ("better", 4), "kernel 3 -> 7": ("same", 8), "kernel 3 -> 9": ("open", 8),
    }  # fmt: skip
    for kernel in (5, 7, 9):
        judgement = judgements[f"kernel 3 -> {kernel}"]
        mean = np.mean([drawn(kernel, seed) - drawn(3, seed) for seed in range(int(judgement.seeds))])
        assert judgement.mean == pytest.approx(mean, abs=1e-6)
        assert judgement.low < judgement.mean < judgement.high
    assert directory.read_race().model_dump() == {
        "alpha": pytest.approx(0.05), "margin": 1.0, "first": 4, "last": 8, "contrasts": 3, "seen": 0,
    }  # fmt: skip
    first = "look at 4 seeds:\n  better, at 4 seeds: kernel 3 -> 5\n  goes on: kernel 3 -> 7; kernel 3 -> 9"
    assert first in outcome.err
    note = "A race: seeds are added until each contrast is decided; its intervals pay for a look after each"
    assert note in outcome.out
    assert re.search(r"^kernel +3 -> 5 .* better +", outcome.out, re.MULTILINE)

    again = expertgrid("run", "s.toml", *RACE)
    assert again.out == outcome.out
    assert len(engine.trained) == sum(seeds_of(directory))


@pytest.mark.parametrize("trained", [0, 5, 17, 24])
def test_an_interrupted_race_ends_as_if_it_had_not_been(expertgrid, engine, tmp_path, trained):
    engine.interrupt_after = trained
    assert expertgrid("run", "s.toml", *RACE).status == 130
    directory = StudyDirectory(tmp_path / "runs" / "s")
    if trained >= 16:  # whichever row was being trained, the clear one is the best
        assert best_row(read_results(directory).rows).name == "kernel 5"
    engine.interrupt_after = None
    assert expertgrid("run", "s.toml", *RACE).status == 0
    assert seeds_of(directory) == [8, 4, 8, 8]
    assert len(engine.trained) == len(set(engine.trained)) == 28


def test_a_failed_trial_ends_its_contrast_and_no_other(expertgrid, engine, tmp_path):
    engine.fails = (9, 4)
    outcome = expertgrid("run", "s.toml", *RACE)
    assert outcome.status == 1
    directory = StudyDirectory(tmp_path / "runs" / "s")
    judgements = {effect.name: effect.judgement for effect in read_evidence(directory).effects}
    assert [judgement.verdict for judgement in judgements.values()] == ["better", "same", "none"]
    assert "diverged in 1 of 5 seeds" in judgements["kernel 3 -> 9"].reason
    assert seeds_of(directory) == [5, 4, 5, 5]
    assert "Failed: 1 of the trials (1 diverged)." in outcome.out


def test_a_race_can_be_no_other_than_it_was(expertgrid, engine, tmp_path):
    expertgrid("run", "s.toml", *RACE)
    before = (tmp_path / "runs" / "s" / "plan.json").read_bytes()
    for arguments, message in [
        ([], "--out runs/s: holds a race; go on with --until decided --max-seeds 8"),
        (["--until", "decided", "--max-seeds", 9], "--max-seeds was 8 when this race was begun, and cannot be 9 now"),
        ([*RACE, "--seeds", 5], "--seeds was 4 when this race was begun, and cannot be 5 now"),
    ]:
        assert message in expertgrid("run", "s.toml", *arguments).complaint
    (tmp_path / "s.toml").write_text(STUDY.replace("9]", "9, 11]"))
    complaint = expertgrid("run", "s.toml", *RACE).complaint
    assert "has results, and the study now has more levels of kernel: 11" in complaint
    (tmp_path / "s.toml").write_text(STUDY.replace("margin = 1.0", "margin = 2.0"))
    assert "holds another study" in expertgrid("run", "s.toml", *RACE).complaint
    assert (tmp_path / "runs" / "s" / "plan.json").read_bytes() == before


def test_a_race_after_results_were_seen_says_so(expertgrid, engine):
    expertgrid("run", "s.toml", "--device", "cpu")
    assert "The race was begun after results of 16 trials were seen." in expertgrid("run", "s.toml", *RACE).out


def test_dry_run_says_the_most_it_can_cost(expertgrid, engine, tmp_path):
    outcome = expertgrid("run", "s.toml", *RACE, "--dry-run")
    assert "A race: the first look is at 4 seeds, and needs 16 trials." in outcome.out
    assert "goes on to seed 8, all 32 trials are trained. 0 are done." in outcome.out
    assert (engine.trained, (tmp_path / "runs").exists()) == ([], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--until", "decided"], "--until decided: --max-seeds N is needed"),
        (["--max-seeds", 5], "--max-seeds 5: goes with --until decided"),
        (["--until", "done", "--max-seeds", 5], "--until: 'done' is not one of 'decided'"),
        (["--until", "decided", "--max-seeds", 4], "--max-seeds 4: from 5 (the first look is at 4) to 100"),
        (["--until", "decided", "--max-seeds", 101], "--max-seeds 101: from 5"),
        (["--until", "decided", "--max-seeds", 9, "--seeds", 3], "the first look needs 4 seeds or more, found 3"),
    ],
)
def test_options_that_make_no_race_are_one_line(expertgrid, engine, tmp_path, arguments, message):
    outcome = expertgrid("run", "s.toml", *arguments)
    assert (outcome.status, engine.trained, (tmp_path / "runs").exists()) == (2, [], False)
    assert message in outcome.complaint


def test_a_single_network_cannot_race(expertgrid, engine, tmp_path):
    (tmp_path / "s.toml").write_text(STUDY.replace("[3, 5, 7, 9]", "[3]"))
    assert "nothing to compare it with" in expertgrid("run", "s.toml", *RACE).complaint

"""Trackers: what they are shown, live and later, and that none of them fails a trial."""

import pytest
from conftest import written_epochs
from PIL import Image

from expertgrid.ablations.engines.events import EpochDone, TrialDone, TrialFailed, TrialStarted
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Failure
from expertgrid.ablations.trackers.tracking import Ended, Tracker, Tracking, TrialRun

ONE_TRIAL = """
question = "Does it go on?"
seeds = 1
[base]
model = "two_block"
[set]
width = 0.0625
"recipe.epochs" = 1
"""


class Kept(Tracker):
    """Keeps what it is shown. Raises OSError where `broken` names what is shown."""

    def __init__(self, broken: str = "", has: tuple[str, ...] = ()):
        self.broken, self.has, self.calls = broken, has, []

    def _keep(self, *call) -> None:
        self.calls.append(call)
        if call[0] == self.broken:
            raise OSError("the server has gone")

    def begin_trial(self, run: TrialRun) -> None:
        self._keep("begin", run.trial)

    def add_images(self, run: TrialRun, sheet: Image.Image) -> None:
        self._keep("images", run.trial, sheet.mode)

    def add_epoch(self, run: TrialRun, epoch: int, metrics: dict[str, float]) -> None:
        self._keep("epoch", run.trial, epoch, metrics["validation_accuracy"])

    def end_trial(self, run: TrialRun, record, metrics: dict[str, float]) -> None:
        self._keep("end", run.trial, metrics["final/test_accuracy"])

    def fail_trial(self, run: TrialRun, reason: str) -> None:
        self._keep("fail", run.trial, reason)

    def close(self, ended: Ended) -> None:
        self._keep("close", ended.winner)

    def holds(self, record) -> bool:
        return record.trial in self.has


def trials_of(study: StudyDirectory) -> list:
    return [study.config(trial) for trial in study.read_plan().trials]


def test_a_finished_study_is_shown_whole(study, digits):
    kept, has_first, said = Kept(), Kept(has=(trials_of(study)[0].id,)), []
    tracking = Tracking(study, digits, {"new": kept, "old": has_first}, said.append)
    tracking.replay()
    tracking.close()
    first, *others = trials_of(study)
    of_first = [call for call in kept.calls[:-1] if call[1] == first.id]
    assert of_first[:2] == [("begin", first.id), ("images", first.id, "RGB")]
    assert of_first[2:] == [("epoch", first.id, 1, 0.4), ("epoch", first.id, 2, 0.5), ("end", first.id, 0.5)]
    assert [call for call in kept.calls if call[0] == "end"] == [("end", trial.id, 0.5) for trial in [first, *others]]
    assert len([call for call in kept.calls if call[0] == "images"]) == 1  # all trials have one recipe
    assert kept.calls[-1] == ("close", first.id)
    assert [call for call in has_first.calls if call[1] == first.id] == [("close", first.id)]
    assert [call for call in has_first.calls if call[0] == "end"] == [("end", trial.id, 0.5) for trial in others]
    assert said == tracking.lost == []


def test_epochs_before_an_interruption_and_failures_are_shown(study):
    trial, other = trials_of(study)[:2]
    kept = Kept()
    tracking = Tracking(study, None, {"kept": kept}, print)
    tracking.show(TrialStarted(trial))
    written_epochs(study, trial.id, [60.0])  # its events come twice: the process that trained it was lost
    tracking.show(EpochDone(trial, study.epochs(trial.id)[1].model_copy(update={"epoch": 2})))
    tracking.show(TrialStarted(trial))
    tracking.show(EpochDone(trial, study.epochs(trial.id)[2].model_copy(update={"epoch": 3})))
    tracking.show(TrialDone(trial, study.record(trial.id)))
    tracking.show(TrialFailed(other, "diverged: nan"))
    tracking.close()
    assert kept.calls[:-1] == [
        ("begin", trial.id), ("epoch", trial.id, 1, 0.4), ("epoch", trial.id, 2, 0.5),
        ("begin", trial.id), ("epoch", trial.id, 1, 0.4), ("epoch", trial.id, 2, 0.5), ("epoch", trial.id, 3, 0.6),
        ("end", trial.id, 0.5), ("begin", other.id), ("fail", other.id, "diverged: nan"),
    ]  # fmt: skip

    (study.trial(other.id) / "record.json").unlink()
    study.write_failure(other.id, Failure(kind="diverged", error="nan", traceback="", time=""))
    for failures, shown in ((False, []), (True, [("fail", other.id, "diverged: nan")])):
        later = Kept()
        tracking = Tracking(study, None, {"later": later}, print)
        tracking.replay(failures)
        tracking.close()
        assert [call for call in later.calls if call[0] == "fail"] == shown


@pytest.mark.parametrize("broken", ["begin", "images", "epoch", "end", "close"])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(study, digits, broken):
    kept, fails, said = Kept(), Kept(broken), []
    tracking = Tracking(study, digits, {"good": kept, "bad": fails}, said.append)
    tracking.replay()
    tracking.close()
    (line,) = said
    assert line.startswith("tracker bad: OSError: the server has gone")
    assert tracking.lost == ["bad"]
    assert len([call for call in kept.calls if call[0] == "end"]) == len(trials_of(study))
    assert len([call for call in fails.calls if call[0] == broken]) == 1


def test_what_cannot_be_read_for_the_trackers_fails_no_trial(study):
    said, kept = [], Kept()
    tracking = Tracking(study, None, {"kept": kept}, said.append)
    stranger = trials_of(study)[0].model_copy(update={"seed": 77})
    tracking.show(TrialStarted(stranger))
    tracking.close()
    (line,) = said
    assert "is not planned" in line
    assert kept.calls == []


# --- As commands ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neptune", "unknown tracker 'neptune'. Accepted: tensorboard, mlflow, wandb"),
        ("wandb:http://somewhere", "only mlflow takes a store"),
        ("mlflow:", "only mlflow takes a store"),
    ],
)
def test_a_wrong_tracker_is_an_error_before_the_training(expertgrid, tiny_study, name, message):
    outcome = expertgrid("run", tiny_study, "--track", name)
    assert outcome.status == 2
    assert message in outcome.complaint
    assert not (tiny_study.parent / "runs").exists()


def test_a_tracker_that_is_not_installed_names_its_extra(expertgrid, tiny_study, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for line in (["run", tiny_study, "--track", "wandb"], ["run", tiny_study, "--track", "mlflow:http://server"]):
        outcome = expertgrid(*line)
        name = line[-1].partition(":")[0]
        assert outcome.status == 2
        assert f"tracker {name}: is not installed; `uv sync --extra {name}` brings it" in outcome.complaint


def test_a_study_goes_on_without_a_tracker_that_fails(expertgrid, tiny_study, monkeypatch):
    """The disk, the server or the tracker's own code: it is named on stderr, and all trials finish."""
    tiny_study.write_text(ONE_TRIAL)

    monkeypatch.setattr("expertgrid.ablations.cli.track._tracker", lambda text, study: Kept("epoch"))
    outcome = expertgrid("run", tiny_study, "--track", "tensorboard", "--device", "cpu")
    assert outcome.status == 0
    assert outcome.err.count("tracker tensorboard: OSError: the server has gone") == 1
    assert len(list((tiny_study.parent / "runs" / "tiny" / "trials").glob("*/record.json"))) == 1
    directory = tiny_study.parent / "runs" / "tiny"
    outcome = expertgrid("track", directory, "--to", "tensorboard")
    assert (outcome.status, outcome.out) == (1, "")

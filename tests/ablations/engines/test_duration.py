"""The time left, by recorded events and a clock of ours, and how it is drawn."""

import io
import itertools

import pytest
from conftest import TINY_STUDY
from rich.console import Console

from expertgrid.ablations.cli import interrupt
from expertgrid.ablations.engines.duration import AROUND_S, EVALUATION, TimeLeft, in_time
from expertgrid.ablations.engines.events import EpochDone, TrialFailed, TrialStarted
from expertgrid.ablations.engines.progress import STOPPING, StudyProgress, shortened
from expertgrid.ablations.study.study_file import parse_study
from expertgrid.model.training.trial import Epoch


@pytest.fixture
def cells(digits, tmp_path):
    return parse_study(TINY_STUDY, tmp_path / "tiny.toml").cells(digits)


@pytest.fixture
def trials(cells):
    return list({trial.id: trial for seed in (0, 1) for cell in cells for trial in [cell.trials[seed]]}.values())


def epoch(number, train_seconds):
    return Epoch(
        epoch=number, lr=0.1, train_loss=0.5, train_accuracy=0.5, validation_loss=1.0, validation_accuracy=0.5,
        images_per_s=1293 / train_seconds, train_seconds=train_seconds, validation_seconds=0.0,
    )  # fmt: skip


STEPS = 1293 // 128
STEP_S = {"1": 1.0, "2": 3.0}  # by experts: not as their MACs say


def true_s(trial):
    """What the trials of this machine take: two epochs, and images that are evaluated for a third of the time."""
    images = 3 * 144 + 360
    return STEP_S[experts(trial)] * (2 * STEPS + EVALUATION * images / 128) + AROUND_S


def experts(trial):
    return str(max(len(block.kernels) for block in trial.model.blocks()))


@pytest.mark.parametrize("slots", [1, 2])
def test_the_time_left_is_right_once_each_cell_was_measured(trials, digits, slots):
    """Events of a machine on which a step takes as long as STEP_S says; three cells, two seeds."""
    now, begun = [0.0], {}

    def steps_done():
        passed = {of.id: (now[0] - begun[of.id]) / STEP_S[experts(of)] for of in trials if of.id in begun}
        return {trial: min(2 * STEPS, int(steps)) for trial, steps in passed.items()}

    left = TimeLeft(trials, digits, slots, steps_done=steps_done, clock=lambda: now[0])
    assert left.left_s() is None
    free, happens = [0.0] * slots, []
    for trial in trials:
        begun_s, each_s = min(free), STEP_S[experts(trial)] * STEPS
        free[free.index(begun_s)] = end_s = begun_s + true_s(trial)
        epochs = [(begun_s + number * each_s, EpochDone(trial, epoch(number, each_s))) for number in (1, 2)]
        happens += [(begun_s, TrialStarted(trial)), *epochs, (end_s, TrialFailed(trial, "only its end matters"))]
    whole_s, checked = max(free), 0
    for now[0], event in sorted(happens, key=lambda pair: (pair[0], isinstance(pair[1], TrialStarted))):
        left.take(event)
        if isinstance(event, TrialStarted):
            begun[event.trial.id] = now[0]
        if len(left.step_s) == 3:
            assert left.left_s() == pytest.approx(whole_s - now[0], abs=5.0)  # a step, and what is evaluated
            checked += 1
    assert checked > 10 and left.left_s() == 0.0


def test_steps_count_within_the_first_epoch_and_macs_stand_for_what_was_not_measured(trials, digits):
    now, steps = [0.0], {}
    left = TimeLeft(trials, digits, 1, steps_done=lambda: steps, clock=lambda: now[0])
    first = trials[0]
    left.take(TrialStarted(first))
    now[0], steps[first.id] = 60.0, 1  # a minute to compile
    assert left.left_s() is None
    now[0], steps[first.id] = 66.0, 4
    known = left.left_s()
    ratio = {of.id: left.work[left.cells[of.id]] / left.work[left.cells[first.id]] for of in trials}
    images = EVALUATION * (3 * 144 + 360) / 128
    expected = sum(2.0 * ratio[of.id] * (2 * STEPS + images) + AROUND_S for of in trials) - 2.0 * 4
    assert known == pytest.approx(expected)
    now[0], steps[first.id] = 68.0, 5
    assert left.left_s() == pytest.approx(expected - 2.0)


def test_steps_from_before_took_no_time_of_this_command(trials, digits):
    now, steps = [0.0], {trials[0].id: 0}
    left = TimeLeft(trials[:1], digits, 1, steps_done=lambda: steps, clock=lambda: now[0])
    left.take(TrialStarted(trials[0]))
    for now[0], steps[trials[0].id] in ((1.0, 0), (20.0, STEPS + 1), (22.0, STEPS + 2)):
        known = left.left_s()
    images = EVALUATION * (2 * 144 + 360) / 128
    assert known == pytest.approx(2.0 * (STEPS - 2 + images) + AROUND_S)


def test_records_of_this_machine_say_it_before_a_step(trials, digits, study, monkeypatch):
    left = TimeLeft(trials, digits, 1)
    left.read_records(study.path.parent)
    assert left.left_s() is None  # they name no processor
    monkeypatch.setattr("expertgrid.ablations.engines.duration.cpu_name", lambda: "")
    monkeypatch.setattr("expertgrid.ablations.engines.duration.usable_cores", lambda: None)
    (study.path / "trials" / trials[0].id / "record.json").write_text("{")  # damaged
    left.read_records(study.path.parent)
    assert len(left.step_s) == 3  # the other seed of that cell is there
    assert {step_s for taken in left.step_s.values() for step_s in taken} == {1.0 / 2 / STEPS}  # its train_seconds is 1


def test_timing_alone_is_short_beside_the_training(trials, digits):
    left = TimeLeft(trials, digits, 2, timing=True)
    for trial in trials[:3]:
        left.step_s[left.cells[trial.id]].append(1.0)
    assert left.timing(10_000.0) == (4, 48.0)
    assert left.timing(500.0) == (2, 24.0)  # 5% are 25 s
    assert left.timing(1.0) == (0, 0.0)


def test_times_in_words():
    words = {0.4: "0 s", 40: "40 s", 720: "12 min", 12_600: "3.5 h", 90_000: "25 h", 180_000: "2.1 days"}
    assert {seconds: in_time(seconds) for seconds in words} == words


@pytest.mark.parametrize("width", [60, 80, 130])
def test_a_line_for_each_trial_fits_and_tells_them_apart(cells, trials, digits, width):
    left = TimeLeft(trials, digits, 2)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = StudyProgress(cells, left, 0, console)
    for trial in trials[:2]:
        progress.show(TrialStarted(trial))
        progress.show(EpochDone(trial, epoch(1, 10.0)))
    console.print(progress)
    bar, *lines = console.file.getvalue().splitlines()
    assert len(lines) == 2 and lines[0] != lines[1]
    assert max(map(len, (bar, *lines))) <= width - 3 < len(bar) + 3 and "0/6 trials, about" in bar
    assert all("epoch 2/2, loss 0.500, val 50.0%, 129 images/s" in line for line in lines)


def test_a_line_says_that_a_trial_is_starting_until_its_first_step(cells, trials, digits):
    steps = {trials[0].id: 0}
    left = TimeLeft(trials, digits, 1, steps_done=lambda: steps)
    progress = StudyProgress(cells, left, 0, Console(file=io.StringIO(), width=80))
    progress.show(TrialStarted(trials[0]))
    for steps[trials[0].id], words in ((0, ": starting"), (1, ": epoch 1/2")):
        progress.console.print(progress)
        assert progress.console.file.getvalue().splitlines()[-1].endswith(words)


def test_names_are_shortened_where_they_do_not_differ():
    names = [
        f"resnet18 act={act} norm=batchnorm seed {seed}" for act, seed in itertools.product(("relu", "gelu"), (1, 2))
    ]
    shared = {"resnet18", "norm=batchnorm"}
    for width in (25, 18, 12):
        short = [shortened(name, shared, width) for name in names]
        assert len(set(short)) == 4 and max(map(len, short)) <= width, short


def test_a_signal_says_at_once_that_the_training_stops(cells, trials, digits, capfd):
    console = Console(file=io.StringIO(), width=80)
    progress = StudyProgress(cells, TimeLeft(trials, digits, 1), 0, console)
    try:
        with interrupt.training(progress.stop):
            interrupt._stop(2, None)
            assert capfd.readouterr().err == f"{STOPPING}\n"
            with pytest.raises(KeyboardInterrupt):
                interrupt._stop(2, None)
    finally:
        interrupt.stopped.clear()
    console.print(progress)
    assert STOPPING in console.file.getvalue()

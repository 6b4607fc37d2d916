"""The simulated schedule: the real order of steps on a clock that only counts."""

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import schedule, stages
from bench.gpu.plan import Bench, Size
from model.errors import InputError

RATE = 150e9  # operations a second, whatever records are kept


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "recorded_rate", lambda: RATE)
        return schedule.simulate(25, 300, tmp_path_factory.mktemp("simulated"))


def test_order_is_that_of_the_runner(simulated, tmp_path):
    simulation, run = simulated
    order = [(step.piece, step.name) for step in stages.steps(Bench(tmp_path, torch.device("cuda"), "", False, Size()))]
    done = list(dict.fromkeys((piece, name) for _, piece, name in simulation.done))
    assert [name for name in order if name in done] == done
    assert done[0] == ("check", "versions")
    assert simulation.now <= 25 * 60
    assert {name for name, piece in run.pieces.items() if piece.done} >= {"check", "peaks"}


def test_pieces_keep_to_their_minutes(simulated):
    simulation, _ = simulated
    ends = {(piece, name): end for end, piece, name in simulation.done}
    begun = max(end for (piece, _), end in ends.items() if piece == "fast")
    limit = begun + 60 * stages.MINUTES["card"] + stages.SLICE_S
    assert begun < ends["card", "3-seeds"] <= limit < ends["references", "speed"] + stages.SLICE_S


def test_cut_leaves_what_ended_before(simulated):
    simulation, _ = simulated
    cuts = [schedule.cut(simulation, 60 * minute) for minute in range(1, 26)]
    for piece in stages.PIECES:
        counts = [row[piece] for row in cuts]
        assert counts == sorted(counts)
    assert cuts[-1]["check"] == sum(piece == "check" for _, piece, _ in simulation.done)


def test_next_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "recorded_rate", lambda: RATE)
    first, run = schedule.simulate(15, 300, tmp_path)
    trained = run.pieces["card"].steps["3-seeds"]
    assert not trained.complete
    second, _ = schedule.simulate(15, 300, tmp_path)
    assert second.done[0][1:] == ("card", "3-seeds")


def test_rate_is_that_of_the_records(tmp_path):
    rate = schedule.recorded_rate()
    assert 1e10 < rate < 1e13  # of two cores
    with pytest.raises(InputError, match="has no records of trainings"):
        schedule.recorded_rate(tmp_path)


def test_table_has_each_minute(capsys):
    assert gpu.main(["schedule", "--faster", "3000", "--minutes", "3"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("1 ", "2 ", "3 "))]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert "For the next call: " in out

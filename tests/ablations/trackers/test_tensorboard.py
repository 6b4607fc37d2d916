"""TensorBoard's event files, read back with its own reader."""

import json

from conftest import finished_study


def test_scalars_hyperparameters_and_the_contact_sheet(expertgrid, tmp_path, digits):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import plugin_data_pb2

    study = finished_study(tmp_path / "study", digits)
    place = study.path / "tensorboard"
    for _ in range(2):  # the second time replaces what the first one wrote
        outcome = expertgrid("track", study.path, "--to", "tensorboard")
        assert (outcome.status, outcome.out) == (0, f"{study.path}: 6 trials are in tensorboard\n")
    assert len(list(place.rglob("events.out.tfevents.*"))) == 6

    found = EventMultiplexer().AddRunsFromDirectory(str(place))
    found.Reload()
    trials = {name.rpartition("(")[2].rstrip(")"): name for name in found.Runs()}
    assert set(trials) == set(study.read_plan().trials)
    assert any(name.startswith("experts 2, gate mlp, seed 1") for name in trials.values())
    for trial, run in trials.items():
        curve = [(event.step, round(event.value, 6)) for event in found.Scalars(run, "validation_accuracy")]
        assert curve == [(epoch.epoch, epoch.validation_accuracy) for epoch in study.epochs(trial)]
        (final,) = found.Scalars(run, "final/test_accuracy")
        assert final.value == study.record(trial).test_accuracy
    assert sum("augmented images" in tags["images"] for tags in found.Runs().values()) == 1
    (sheet,) = found.Images(trials[study.read_plan().cells[0].trials[0]], "augmented images")
    assert sheet.encoded_image_string.startswith(b"\x89PNG")
    assert (sheet.width, sheet.height) > (500, 500)

    run = trials[study.read_plan().cells[3].trials[1]]
    content = found.SummaryMetadata(run, "_hparams_/session_start_info").plugin_data.content
    parameters = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (parameters["experts"].string_value, parameters["gate"].string_value) == ("2", "mlp")
    assert (parameters["seed"].number_value, parameters["recipe.epochs"].number_value) == (1, 2)
    assert "final/test_accuracy" in json.dumps(found.Runs()[run]["scalars"])

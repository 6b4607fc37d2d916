"""publish: the folder that timm loads alone, and its upload, to a Hub of the test's own."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import REPOSITORY
from huggingface_hub import ModelCard

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.rows import best_record, best_row, read_results
from expertgrid.export.certificate import read_certificate
from expertgrid.export.hub import front_matter, write_folder
from expertgrid.model.checkpoint import Checkpoint, Trained, load
from expertgrid.model.config import TimmModel
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

ALONE = """
import json, sys
import timm, torch

found = {}
for folder in json.loads(sys.argv[1]):
    if folder == "import expertgrid.model":
        before = [name for name in sys.modules if name.startswith("expertgrid")]
        import expertgrid.model
        continue
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x_BCHW = torch.linspace(-1, 1, 2 * 1 * 8 * 8).reshape(2, 1, 8, 8)
    about = timm.data.resolve_data_config(model=net)
    found[folder] = [net(x_BCHW).tolist(), net.pretrained_cfg["label_names"], about["mean"], about["input_size"]]
print(json.dumps([found, before, [f for f in ("export", "ablations") if f"expertgrid.{f}" in sys.modules]]))
"""


@pytest.fixture
def finished(trained_study) -> Path:  # what the fixture `study` copies
    return trained_study


def best_of(study: StudyDirectory) -> Checkpoint:
    return load(study.checkpoint(best_record(best_row(read_results(study).rows)).trial))


def baseline(name: str) -> Checkpoint:
    """A network of timm, untrained, for digits."""
    config = TimmModel(timm=name, in_chans=1)
    trained = Trained(
        trial="0" * 12, model=name, data="digits", fingerprint="", classes=tuple("0123456789"), image_size=(8, 8),
        mean=(0.5,), std=(0.25,),
    )  # fmt: skip
    return Checkpoint(config, trained, build(config).state_dict())


def test_timm_alone_loads_what_was_published(expertgrid, study, tmp_path):
    """A baseline without anything of ours; a soft-expert network with `expertgrid.model`, and never the rest."""
    folder, other = tmp_path / "published", tmp_path / "baseline"
    outcome = expertgrid("publish", study.path, folder)  # exports it first
    assert outcome.status == 0, outcome.err
    resnet = baseline("test_resnet.r160_in1k")
    write_folder(other, resnet, "# A card", [], {})
    folders = json.dumps([str(other), "import expertgrid.model", str(folder)])
    path = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    call = [sys.executable, "-W", "ignore", "-c", ALONE, folders]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    found, before, after = json.loads(done.stdout)
    assert (before, after) == ([], [])

    checkpoint = best_of(study)
    x_BCHW = torch.linspace(-1, 1, 2 * 1 * 8 * 8).reshape(2, 1, 8, 8)
    for place, known in ((folder, checkpoint), (other, resnet)):
        logits_BN, classes, mean, input_size = found[str(place)]
        assert torch.equal(torch.tensor(logits_BN), known.network()(x_BCHW))
        assert (classes, input_size) == (list(known.trained.classes), [1, 8, 8])
        assert mean == list(known.trained.mean)

    pixels_BHWC = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
    (logits,) = onnxruntime.InferenceSession(folder / "model-uint8.onnx").run(None, {"images": pixels_BHWC})
    normal_BHWC = (pixels_BHWC / np.float32(255) - checkpoint.trained.mean) / checkpoint.trained.std
    x_BCHW = torch.tensor(normal_BHWC, dtype=torch.float32).permute(0, 3, 1, 2)
    assert np.allclose(load(folder / "model.safetensors").network()(x_BCHW).detach(), logits, atol=1e-4)
    assert read_certificate((folder / "model-uint8.onnx").read_bytes(), folder / "model-uint8.onnx").passed

    text = (folder / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    record = study.record(checkpoint.trained.trial)
    assert card.data.eval_results[0].metric_value == record.test_accuracy
    assert "Two experts or one?" in text
    assert "### What each factor does" in text
    assert "timm.create_model('local-dir:published', pretrained=True)" in text
    assert str(tmp_path) not in text
    assert json.loads((folder / "record.json").read_text())["trial"] == checkpoint.trained.trial

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    outcome = expertgrid("publish", study.path, folder)
    assert outcome.status == 2
    assert "is not empty" in outcome.complaint
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_network_that_timm_does_not_fill_is_refused(tmp_path, monkeypatch):
    """A user's network that ignores `pretrained` would be published with other weights."""
    from timm.models import register_model
    from torch import nn

    def deaf_net(pretrained=False, in_chans=3, num_classes=10, **kwargs):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_chans, num_classes))

    deaf_net.__module__ = "__main__"
    register_model(deaf_net)
    with pytest.raises(InputError, match="timm makes it without the weights of the folder"):
        write_folder(tmp_path / "deaf", baseline("deaf_net"), "# A card", [], {})
    assert list(tmp_path.iterdir()) == []


def test_known_data_sets_have_their_names_on_the_hub():
    known = baseline("test_resnet")
    cifar = Checkpoint(known.config, known.trained.model_copy(update={"data": "cifar10"}), {})
    data = ModelCard(f"{front_matter(cifar, 0.9, 10_000)}\n").data
    assert data.datasets == ["uoft-cs/cifar10"]


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload and timm's download use, without accounts."""

    files: dict[str, bytes] = {}
    made: list[dict] = []

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(given))
            return self._answer({"url": "https://huggingface.co/me/tiny", "id": "me/tiny"})
        if self.path.startswith("/api/models/me/tiny/preupload/"):
            paths = [file["path"] for file in json.loads(given)["files"]]
            regular = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._answer({"files": regular})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        assert self.path.startswith("/api/models/me/tiny/commit/")
        for line in given.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        done = "https://huggingface.co/me/tiny/commit/1"
        return self._answer({"commitUrl": done, "commitOid": "1" * 40, "success": True})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/me/tiny"):
            return self._answer({"id": "me/tiny", "sha": "1" * 40, "siblings": [], "private": True})
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            return self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        about = {"ETag": f'"{len(content)}"', "X-Repo-Commit": "1" * 40}
        return self._answer(content, 200, about)

    do_HEAD = do_GET

    def _answer(self, content: object, status: int = 200, about: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(about or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[str]:
    """The address of a Hub on this machine, which huggingface_hub then uses."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "made", [])
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address
    server.shutdown()
    server.server_close()


def test_what_was_uploaded_is_loaded_from_the_hub(expertgrid, study, hub):
    import timm

    outcome = expertgrid("publish", study.path, "hf-hub:me/tiny", "--private")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1].startswith(f"{hub}/me/tiny: two_block, trial ")
    (made,) = Hub.made
    assert made.get("visibility") == "private" or made.get("private") is True  # as the version of the library says it
    assert set(Hub.files) == {
        "README.md", "config.json", "model.safetensors", "model-uint8.onnx", "model-uint8.certificate.json",
        "record.json",
    }  # fmt: skip
    assert b"timm.create_model('hf-hub:me/tiny', pretrained=True)" in Hub.files["README.md"]
    weights = timm.create_model("hf-hub:me/tiny", pretrained=True).state_dict()
    known = best_of(study).weights
    assert all(torch.equal(weights[name], known[name]) for name in known)


def test_without_a_network_or_with_a_wrong_target_it_is_one_line(expertgrid, study, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert expertgrid("export", study.path).status == 0
    for arguments, message in {
        ("hf-hub:me/tiny",): "hf-hub:me/tiny: was not uploaded: ",
        ("hf-hub:me",): "hf-hub:OWNER/NAME is needed",
        (tmp_path / "out", "--private"): "--private: is for hf-hub:OWNER/NAME",
        (study.path / "study.toml",): "cannot be written",
        (tmp_path / "out", "--data", "digits"): "is there already",
    }.items():
        outcome = expertgrid("publish", study.path, *arguments)
        assert outcome.status == 2, outcome.out
        assert message in outcome.complaint
    assert not (tmp_path / "out").exists()

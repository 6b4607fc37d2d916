"""The exported files of expertgrid's own networks with their certificates, made on a CPU after the measurement."""

import sys
from pathlib import Path

import torch

from ablations.records import StudyDirectory
from ablations.training.splits import ResidentData
from bench.gpu.decoded import load_decoded
from bench.gpu.pieces import Measured, Piece, write_piece
from bench.gpu.plan import NETWORKS, SMOKE, Size
from bench.gpu.runner import environment
from bench.gpu.stages import weights_of
from export.metadata import Precision
from export.precision import PrecisionError
from export.publish import Images, Reference, publish
from model.checkpoint import Checkpoint, load
from model.errors import InputError
from model.files import now


def certify(place: Path, source: str, smoke: bool) -> int:
    """Exports and certifies the networks whose weights are in `place`, which has the results; 1 where one fails.

    Raises InputError where there are no weights, and for data that the networks were not trained on.
    """
    files = {name: weights_of(place, name) for name in NETWORKS}
    there = {name: load(file) for name, file in files.items() if file.exists()}
    if not there:
        raise InputError(f"{place}: there are no weights: {', '.join(map(str, files.values()))}")
    data = ResidentData(load_decoded(source, place / "work" / "decoded"), torch.device("cpu"))
    for name, checkpoint in there.items():
        if checkpoint.trained.fingerprint != data.data.fingerprint:
            raise InputError(f"--data {source}: {name} was trained on other data")
    piece = Piece(piece="certificates", smoke=smoke, data=data.data.name, command="python -m bench.gpu certify")
    piece.environments.append(environment(torch.device("cpu")))
    for name, checkpoint in there.items():
        reference = Reference(checkpoint, images_of(place, name, checkpoint, data), "uint8")
        for precision in (SMOKE if smoke else Size()).precisions:
            step = f"export-{name}-{precision}"
            print(f"certificates: {step}", file=sys.stderr, flush=True)
            try:
                value = exported(reference, place / "work" / "export" / f"{name}-{precision}.onnx", precision)
            except PrecisionError as error:
                piece.failed[step] = str(error)
                print(f"error: {step}: {error}", file=sys.stderr)
            else:
                piece.steps[step] = Measured(complete=True, finished=now(), seconds=0.0, environment=0, value=value)
            piece.done = not piece.failed
            write_piece(place / "certificates.json", piece)
    return 0 if piece.done else 1


def images_of(place: Path, name: str, checkpoint: Checkpoint, data: ResidentData) -> Images:
    """The images of the trial that a checkpoint is of. Raises InputError where its config is not there."""
    directory = StudyDirectory(place / "work" / name)
    config = directory.config(checkpoint.trained.trial)
    if config is None:
        raise InputError(f"{directory.trial(checkpoint.trained.trial)}: there is no config.json")
    directory.enter_test_read(checkpoint.trained.trial, "export", len(data.data.test))
    return Images(**data.splits(config.hold_out, config.seed).arrays())


def exported(reference: Reference, file: Path, precision: Precision) -> dict[str, object]:
    """Writes the file with its certificate; what the tables show of them."""
    for kept in (file, file.with_suffix(".rejected.onnx")):
        kept.unlink(missing_ok=True)
    published = publish(reference, precision)
    written = published.write(file)
    certificate = published.certificate.model_dump(mode="json")
    return {"file": written.name, "bytes": written.stat().st_size, "certificate": certificate}

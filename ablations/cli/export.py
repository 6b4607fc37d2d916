"""Taking a network away: ONNX files with certificate and card, what they are, and what they predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from expertgrid.ablations.cli.options import check_can_be_written
from expertgrid.ablations.cli.sources import read_data
from expertgrid.ablations.cli.terminal import status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.reading import read_config
from expertgrid.ablations.results.rows import Row, best_record, best_row, read_results
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.description import recipe_in_words
from expertgrid.bench.tune import rows as tuning_rows
from expertgrid.bench.tune import tune
from expertgrid.export.card import card
from expertgrid.export.certify import DEFAULT_REWRITES, CertifiedModel, Images, Reference, certified, rewritten
from expertgrid.export.describe import describe
from expertgrid.export.metadata import Input, Precision
from expertgrid.export.precision import PrecisionError
from expertgrid.export.prune import pruned
from expertgrid.export.session import check_provider
from expertgrid.model.checkpoint import Checkpoint, Trained, load
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import render
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.splits import ResidentData
from expertgrid.model.training.trial import Trial


def export(
    source: Path,
    input: Input = "uint8",
    precision: Precision | Literal["all"] = "fp32",
    outputs: Sequence[str] = ("logits",),
    fuse: bool = True,
    prune_gates: float | None = None,
    providers: Sequence[str] = ("cpu",),
    tuned_for: int | None = None,  # the batch size
    out: Path | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    brief: bool = False,  # the tuning takes some seconds
) -> int:
    """Writes the network of a study or checkpoint as ONNX; 1 where a precision fails or is not certified."""
    for name in providers:
        check_provider(name)
    directory = StudyDirectory(source) if source.is_dir() else None
    path = best_checkpoint(directory) if directory else source
    around = path.absolute().parents[2:3]
    ledger = directory or next((StudyDirectory(place) for place in around if (place / "study.toml").exists()), None)
    file = out or (directory.path / "export" if directory else path.parent) / (
        f"model-{input}{'' if prune_gates is None else '-pruned'}{'' if tuned_for is None else '-tuned'}.onnx"
    )
    check_can_be_written("--out", file, file.with_stem(f"{file.stem}-fp16.rejected").with_suffix(".certificate.json"))
    checkpoint, trial = load(path), read_config(path.parent)
    held_out_for = "--prune-gates" if prune_gates is not None else f"--precision {precision}"
    if tuned_for is not None and prune_gates is None:
        held_out_for = "--tune"
    if trial is None and (prune_gates is not None or tuned_for is not None or precision != "fp32"):
        missing = path.parent / "config.json"
        raise InputError(f"{held_out_for}: {missing} is missing; it says which images the training held out")
    plan = ledger.read_plan() if ledger else None
    data_source = data or (plan.source if plan else checkpoint.trained.data)
    images = read_data(data_source, data_dir, plan.image_size if plan else None)
    _check_data(images, path, checkpoint, trial)
    hold_out, seed = (trial.hold_out, trial.seed) if trial else (images.hold_out(), 0)
    arrays = Images(**ResidentData(images, torch.device("cpu")).splits(hold_out, seed).arrays())
    if prune_gates is not None:
        checkpoint, dropped = pruned(checkpoint, arrays.validation, arrays.validation_labels, prune_gates)
        print(dropped)
    reference = Reference(checkpoint, arrays, input, prune_gates)
    rows = read_results(directory).rows if directory and prune_gates is None else []

    def enter_test_read() -> None:
        if ledger:
            ledger.enter_test_read(checkpoint.trained.trial, "export", len(images.test))

    if tuned_for is not None:
        with status(f"timing engines, precisions and rewrites at batch {tuned_for}"):
            model = tune(reference, providers[0], tuned_for, outputs, enter_test_read, brief=brief)
        print(render(tuning_rows(model.certificate.tuning), "text"))
        print()
        return 0 if _write(model, file, checkpoint.trained, images, trial, rows) else 1
    passed = True
    kinds: list[Precision] = ["fp32", "fp16", "int8"] if precision == "all" else [precision]
    for kind in kinds:
        enter_test_read()
        try:
            with status(f"exporting {kind}, and comparing with PyTorch on the test images"):
                made = rewritten(reference, kind, DEFAULT_REWRITES if fuse else (), outputs)
                model = certified(made, reference, kind, providers, "openvino" if kind == "bf16" else "cpu")
        except PrecisionError as error:
            passed = False
            print(f"{kind}: not exported: {error}")
            continue
        name = file if kind == "fp32" else file.with_stem(f"{file.stem}-{kind}")
        passed &= _write(model, name, checkpoint.trained, images, trial, rows)
    return 0 if passed else 1


def best_checkpoint(directory: StudyDirectory) -> Path:
    """The best trial on validation of a study's best cell. Raises InputError where no trial is finished."""
    row = best_row(read_results(directory).rows)
    if row is None:
        raise InputError(f"{directory.path}: no trial of this study is finished")
    return directory.checkpoint(best_record(row).trial)


def _check_data(images: ImageData, path: Path, checkpoint: Checkpoint, trial: Trial | None) -> None:
    """Raises InputError for images that the network was not trained on."""
    trained = checkpoint.trained.classes, checkpoint.trained.image_size, checkpoint.config.in_chans
    if (images.classes, images.image_size, images.channels) != trained:
        raise InputError(f"--data {images.source}: {images.name} has other classes or image sizes than {path} has")
    if trial is not None:
        trial.check_images(images)


def _write(
    model: CertifiedModel, file: Path, trained: Trained, data: ImageData, trial: Trial | None, rows: list[Row]
) -> bool:
    """Writes an exported model with its certificate and card; a rejected one has another name. Whether it passed.

    `trial` is what was trained, where that is known, and `rows` are those among which the card finds it.
    """
    certificate, text = model.certificate, ""
    if certificate.passed:
        row = [row for row in rows if any(record.trial == trained.trial for record in row.records)]
        text = card(
            describe(model.model, file.name),
            certificate,
            trained=[f"Recipe: {recipe_in_words(trial.recipe)}.", f"Data: {data.in_words(trial.hold_out)}."]
            if trial
            else [],
            results=columns(row)[0] if row else {},
        )
    written = model.write(file, text)
    floats = f"; {len(model.float_nodes)} nodes stay in float" if model.float_nodes else ""
    size = f"{len(model.model):,} bytes"
    print(f"{written}: {trained.model}, trial {trained.trial}, {size}{floats}, {certificate}", flush=True)
    return certificate.passed

"""Publishing the best network of a study: a folder that timm loads, or its upload to the Hugging Face Hub."""

import tempfile
from pathlib import Path

from expertgrid.ablations.cli.export import best_checkpoint, export
from expertgrid.ablations.cli.options import hub_repository
from expertgrid.ablations.cli.terminal import status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.records.record import Record
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.rows import Row
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.description import describe
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.export.card import card
from expertgrid.export.exported import ExportedFile, exported_files
from expertgrid.export.hub import check_free, front_matter, loading, upload, write_folder
from expertgrid.model.checkpoint import Checkpoint, load
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import markdown, render_tables
from expertgrid.model.training.trial import Trial


def publish(directory: Path, target: str, private: bool, data: str | None, data_dir: Path | None) -> int:
    """Writes the folder of a study's best network, or uploads it. A network without an ONNX file is exported first."""
    repository = hub_repository(target)
    if repository is None:
        check_free(Path(target))
    study = StudyDirectory(directory)
    path = best_checkpoint(study)
    checkpoint = load(path)
    files = _files(study, checkpoint)
    if not files:
        if export(directory, data=data, data_dir=data_dir):
            return 1
        files = _files(study, checkpoint)
    elif data is not None or data_dir is not None:
        raise InputError(f"--data: {files[0].file} is there already; the images are for an export")
    trained = checkpoint.trained.trial
    record, trial = study.record(trained), study.config(trained)
    if record is None or trial is None:
        raise InputError(f"{path.parent}: its record or its config is missing; `expertgrid check` says more")
    text = _card(study, checkpoint, files, trial, record, target if repository else f"local-dir:{Path(target).name}")
    copied = [file for exported in files for file in (exported.file, exported.certificate_file)]
    more = {"record.json": record.model_dump_json(indent=1).encode()}
    if repository is None:
        write_folder(Path(target), checkpoint, text, copied, more)
        place = target
    else:
        with tempfile.TemporaryDirectory() as beside:
            folder = Path(beside) / "network"
            write_folder(folder, checkpoint, text, copied, more)
            with status(f"uploading to {repository}"):
                place = upload(folder, repository, private)
    print(f"{place}: {trial.model_name}, trial {trial.id}, {len(files)} ONNX {'file' if len(files) == 1 else 'files'}")
    return 0


def _files(study: StudyDirectory, checkpoint: Checkpoint) -> list[ExportedFile]:
    """The exported files of a network; none where none is the network as it was trained."""
    files = [file for file in exported_files(study.path / "export") if file.trial == checkpoint.trained.trial]
    return files if any(file.is_the_network for file in files) else []


def _latency(row: Row, trial: str) -> list[dict[str, object]]:
    """What `expertgrid bench` measured of the trial's file; nothing where that was never run."""
    measured = row.latency
    if measured is None or measured.trial != trial:
        return []
    return [
        {"file": Path(measured.file).name, "engine": timed.engine, "batch": timed.batch, "median ms": timed.p50_ms}
        for timed in measured.latencies
    ]


def _card(
    study: StudyDirectory, checkpoint: Checkpoint, files: list[ExportedFile], trial: Trial, record: Record, place: str
) -> str:
    """The model card: how to load the folder, the study that the network comes from, and the card of its first file."""
    evidence = read_evidence(study)
    row = next(row for row in evidence.results.rows if any(its.trial == trial.id for its in row.records))
    tables = render_tables(study_tables(study, evidence), "github")
    by, which = evidence.scale, next(kept for kept in row.records if kept.trial == trial.id)
    metric = "" if by.name == "accuracy" else f"{by.title} {which.score('validation', by):.{by.decimals}f}, "
    of_study = [
        f"The network is the best of a study that asked: {markdown(evidence.results.study.question)}",
        markdown(answer(evidence)),
        tables,
        f"This very network, of seed {record.seed}: {100 * record.validation_accuracy:.2f}% of "
        f"{record.validation_images:,} validation images, {metric}by which it was chosen, and "
        f"{100 * record.test_accuracy:.2f}% of {record.test_images:,} test images. `record.json` has all its numbers, "
        "and the machine and the versions that it was trained with.",
    ]
    other = [
        f"- {markdown(f'{exported.file.name}, {exported.certificate_file.name}: {exported.certificate}')}"
        for exported in files
    ]
    first = files[0]
    text = card(
        first.description,
        first.certificate,
        trained=describe(study, evidence.results, [row]),
        results=columns([row])[0],
        latency=_latency(row, trial.id),
        more={
            "How to load it": loading(checkpoint, place),
            "The evidence": "\n\n".join(of_study),
            "The ONNX files": "\n".join(other),
        },
    )
    return f"{front_matter(checkpoint, record.test_accuracy, record.test_images)}\n\n{text}"

"""`run` without a study: the study `quickstart`, then export, certificate, tuning, latency and report."""

from collections.abc import Sequence
from pathlib import Path

from expertgrid.ablations.cli import bench, export, results, run
from expertgrid.ablations.cli.plan import QUICKSTART
from expertgrid.ablations.cli.terminal import begin_step
from expertgrid.ablations.cli.track import tracked
from expertgrid.ablations.records.directory import StudyDirectory

# Of each file. The intervals are wider than those of `bench`, and nobody waits for them.
BATCHES, MEASURE_S, OPENINGS = (1, 64), 0.3, 3


def quickstart(directory: StudyDirectory, data_dir: Path | None, track: Sequence[str]) -> int:
    """Exports and times the best network of the trained study, writes its report, and prints its tables and answer."""
    begin_step("export", QUICKSTART)
    status = export.export(directory.path, data_dir=data_dir)
    if status == 0:
        begin_step("tuning", QUICKSTART)
        status = export.export(directory.path, tuned_for=1, brief=True, data_dir=data_dir)
    if status == 0:
        begin_step("latency", QUICKSTART)
        files = [directory.path / "export" / f"model-uint8{tuned}.onnx" for tuned in ("", "-tuned")]
        bench.bench(files, batches=BATCHES, measure_s=MEASURE_S, openings=OPENINGS)
        begin_step("report", QUICKSTART)
        status = results.report([directory.path], None, data_dir=data_dir)
    begin_step("", QUICKSTART)
    with tracked(track, directory, None):
        pass  # the trackers that keep files get the new ones
    print()
    run.show_study(directory)
    return status

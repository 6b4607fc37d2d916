"""What a study shows: its tables, its report, and whether its numbers fit each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from expertgrid.ablations.cli.options import check_can_be_written
from expertgrid.ablations.cli.terminal import notice, starting, status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.comparison import compare
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.levels import marginals
from expertgrid.ablations.results.rows import read_results, study_name
from expertgrid.ablations.results.scores import judge_scores, read_scores
from expertgrid.ablations.results.tables.cells import comparison_tables, peek_table
from expertgrid.ablations.results.tables.description import methods as paragraph
from expertgrid.ablations.results.tables.effects import level_table
from expertgrid.ablations.results.tables.scores import score_tables
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.model.system.errors import InputError, printable
from expertgrid.model.system.files import write_whole
from expertgrid.model.system.text import MOST_NOTES, Format, Table, render, render_tables, terminal_width, wrapped


def table(
    directories: Sequence[Path],
    format: Format,
    by: str | None,
    contrast: tuple[str, str] | None,
    peek: bool,
    notes: bool,
    metric: str | None = None,
) -> int:
    """Prints the table of one study or several: of all cells, by factor, of two cells, or of optimistic picks.

    With all its notes, or with the most important ones.
    """
    if peek and metric is not None:
        raise InputError("--peek is about accuracy, which is measured after each epoch; --metric does not go with it")
    if sum((by is not None, contrast is not None, peek)) > 1:
        raise InputError("--by, --contrast and --peek are different tables; give one of them")
    if contrast is not None and len(directories) > 1:
        raise InputError(f"--contrast compares cells of one study; {len(directories)} were given")
    several = len(directories) > 1
    tables = [
        table.named(study_name(directory)) if several else table
        for directory in map(StudyDirectory, directories)
        for table in _tables(directory, by, contrast, peek, metric)
    ]
    print(render_tables(tables, format, None if notes else MOST_NOTES))
    more = sum(len(table.notes[MOST_NOTES:]) for table in tables)
    if more and not notes and format not in ("csv", "json"):
        notice(f"--notes shows {more} more notes")
    return 0


def methods(directories: Sequence[Path], metric: str | None) -> int:
    """Prints the paragraph for a paper of each study."""
    for directory in map(StudyDirectory, directories):
        print(wrapped(printable(paragraph(directory, read_evidence(directory, metric))), terminal_width()))
    return 0


def rows(directory: Path, kind: str, format: str, out: Path | None, metric: str | None) -> int:
    """Prints or writes the rows of a study, as `expertgrid.open` gives them."""
    from expertgrid.ablations.results.arrow import OpenedStudy, to_bytes  # the other tables need no pyarrow

    table = getattr(OpenedStudy(directory, metric), kind)()
    content = to_bytes(table, format) or render(table.to_pylist(), cast(Format, format)).encode()
    if out:
        write_whole(out, content)
    print(out or content.decode().rstrip("\n"))
    return 0


def _tables(
    directory: StudyDirectory, by: str | None, contrast: tuple[str, str] | None, peek: bool, metric: str | None
) -> list[Table]:
    if peek:
        return [peek_table(directory, read_results(directory))]
    evidence = read_evidence(directory, metric)
    if by is not None:
        return [level_table(evidence, marginals(evidence, by.split(",")))]
    if contrast is not None:
        first, second = map(evidence.results.row, contrast)
        return comparison_tables(evidence, compare(directory, evidence, first, second))
    return study_tables(directory, evidence)


def judge(file: Path, margin: float, lower_is_better: bool, format: Format, notes: bool) -> int:
    """Prints the verdicts on a table of scores."""
    judged = judge_scores(read_scores(file), margin, lower_is_better)
    print(render_tables(score_tables(judged), format, None if notes else MOST_NOTES))
    return 0


def report(
    directories: Sequence[Path],
    out: Path | None,
    format: str = "html",
    data: str | None = None,
    data_dir: Path | None = None,
    metric: str | None = None,
) -> int:
    """Writes the report of a study, its figures, or two studies side by side."""
    directory = directories[0]
    as_html = format == "html"
    out = out or directory / ("report.html" if as_html else "figures")
    if as_html and (out.suffix != ".html" or out.is_dir()):
        raise InputError(f"--out {out}: the name of an .html file is needed")
    if not as_html and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: the name of a directory is needed, for {format}")
    check_can_be_written("--out", out if as_html else out / "accuracy.png")
    with starting():
        from expertgrid.ablations.results.report import report
        from expertgrid.ablations.results.report.findings import read_findings
        from expertgrid.ablations.results.report.plots import check_draws
    check_draws("")
    if len(directories) > 1:
        write_whole(out, report.html_of_two(list(map(StudyDirectory, directories)), metric).encode())
        print(out)
        return 0
    with status("reading the study; its best network predicts the validation images"):
        findings = read_findings(StudyDirectory(directory), data, data_dir, metric)
    with status("drawing"):
        if as_html:
            files = {out: report.html(findings).encode()}
        else:
            figures = report.figures(findings, "pdf" if format == "pdf-figures" else "png")
            files = {out / name: content for name, content in figures.items()}
    for file, content in files.items():
        write_whole(file, content)
        print(file)
    return 0


def verify(directory: Path) -> int:
    """Prints each number and file of a study that does not fit the others; 1 where there is one."""
    with starting():
        from expertgrid.ablations.results.verify import verify_study
        from expertgrid.export.exported import export_problems
    with status("recomputing the numbers of the study"):
        numbers = verify_study(StudyDirectory(directory))
        files = dict(export_problems(directory / "export"))
        problems = numbers.problems + [f"export/{file.name}: {problem}" for file, problem in files.items() if problem]
    for line in [*problems, *numbers.skipped]:
        print(line)
    print(f"{directory}: {numbers.checked + len(files)} checks, {len(problems)} do not fit")
    return 1 if problems else 0

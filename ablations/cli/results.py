"""What a study shows: its tables, its report, and whether its numbers fit each other."""

from collections.abc import Sequence
from pathlib import Path

from expertgrid.ablations.cli.options import write_out
from expertgrid.ablations.cli.terminal import starting, status
from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import compare, marginals, read_evidence
from expertgrid.ablations.results.rows import read_results, study_name
from expertgrid.ablations.results.tables import tables
from expertgrid.model.system.errors import InputError
from expertgrid.model.system.text import Format, render_tables


def table(
    directories: Sequence[Path],
    format: Format,
    by: str | None,
    contrast: tuple[str, str] | None,
    peek: bool,
) -> int:
    """Prints the table of one study or several: of all cells, by factor, of two cells, or of optimistic picks."""
    if sum((by is not None, contrast is not None, peek)) > 1:
        raise InputError("--by, --contrast and --peek are different tables; give one of them")
    if contrast is not None and len(directories) > 1:
        raise InputError(f"--contrast compares cells of one study; {len(directories)} were given")
    studies = [StudyDirectory(path) for path in directories]
    if contrast is not None:
        _show_contrast(studies[0], *contrast, format)
        return 0
    if by is None and not peek:
        shown = [tables.study_tables(study, read_evidence(study)) for study in studies]
    elif by is not None:
        found = [read_evidence(study) for study in studies]
        shown = [[tables.factor_levels(evidence, marginals(evidence, by.split(",")))] for evidence in found]
    else:
        shown = [[tables.peek_table(study, read_results(study))] for study in studies]
    named = [
        table.named(study_name(study)) if len(studies) > 1 else table
        for study, its_tables in zip(studies, shown)
        for table in its_tables
    ]
    print(render_tables(named, format))
    return 0


def _show_contrast(directory: StudyDirectory, first: str, second: str, format: Format) -> None:
    evidence = read_evidence(directory)
    found = compare(directory, evidence, *map(evidence.results.row, (first, second)))
    print(render_tables(tables.comparison_tables(evidence, found), format))


def report(directory: Path, out: Path | None = None, format: str = "html", data_dir: Path | None = None) -> int:
    """Writes the report of a study, or its figures."""
    as_html = format == "html"
    out = out or directory / ("report.html" if as_html else "figures")
    if as_html and (out.suffix != ".html" or out.is_dir()):
        raise InputError(f"--out {out}: the name of an .html file is needed")
    if not as_html and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: the name of a directory is needed, for {format}")
    with starting():
        from expertgrid.ablations.results.report import findings, report
    with status("reading the study; its best network predicts the validation images"):
        found = findings.read_findings(StudyDirectory(directory), data_dir)
    with status("drawing"):
        if as_html:
            files = {out: report.html(found).encode()}
        else:
            figures = report.figures(found, "pdf" if format == "pdf-figures" else "png")
            files = {out / name: content for name, content in figures.items()}
    for file, content in files.items():
        write_out("--out", file, content)
        print(file)
    return 0


def verify(directory: Path) -> int:
    """Prints each number and file of a study that does not fit the others; 1 where there is one."""
    with starting():
        from expertgrid.ablations.results.verify import verify_study
        from expertgrid.export.exported import export_problems
    with status("recomputing the numbers of the study"):
        found = verify_study(StudyDirectory(directory))
        files = dict(export_problems(directory / "export"))
        problems = found.problems + [f"export/{file.name}: {problem}" for file, problem in files.items() if problem]
    for line in [*problems, *found.skipped]:
        print(line)
    print(f"{directory}: {found.checked + len(files)} checks, {len(problems)} do not fit")
    return 1 if problems else 0

"""What a study shows: its tables, its report, and whether its numbers fit each other."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ablations.cli.options import write_out
from ablations.cli.terminal import starting, status
from ablations.records import StudyDirectory
from ablations.results import evidence, tables
from model.errors import InputError


def table(
    directories: Sequence[Path],
    format: tables.Format,
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
    by_study = [evidence.study_rows(study) for study in studies]
    rows = [row for rows in by_study for row in rows]
    if by is not None:
        marginals = [evidence.marginals(study, by.split(",")) for study in studies]
        shown = [
            ({"study": evidence.study_name(study)} if len(studies) > 1 else {}) | row
            for study, found in zip(studies, marginals)
            for row in tables.marginal_columns(found)
        ]
        notes = _of_each(studies, [tables.marginal_notes(*both) for both in zip(studies, marginals)])
    elif peek:
        peeks = [evidence.peek(study, row) for study, found in zip(studies, by_study) for row in found]
        shown, notes = tables.peek_columns(rows, peeks), tables.PEEK_NOTES
    else:
        judged = [evidence.judge(found, study.study.margin, study.plan.race) for study, found in zip(studies, by_study)]
        shown = tables.columns(rows, [judgement for judgements in judged for judgement in judgements])
        three = zip(studies, by_study, judged)
        notes = _of_each(
            studies, [tables.notes(study, study.plan, found, verdicts) for study, found, verdicts in three]
        )
    print(tables.render(shown, format, notes))
    return 0


def _of_each(studies: Sequence[StudyDirectory], notes: Sequence[Sequence[str]]) -> list[str]:
    """The notes of all studies, with their names where there are several."""
    return [
        (f"{evidence.study_name(study)}: " if len(studies) > 1 else "") + note
        for study, lines in zip(studies, notes)
        for note in lines
    ]


def _show_contrast(directory: StudyDirectory, first: str, second: str, format: tables.Format) -> None:
    rows = evidence.study_rows(directory)
    a, b = evidence.find_row(rows, first), evidence.find_row(rows, second)
    if a is b:
        raise InputError(f"--contrast: {first!r} and {second!r} are the same cell")
    found = evidence.compare(directory, rows, a, b)
    splits, seeds = tables.comparison_columns(found)
    notes = tables.comparison_notes(found, directory.study.margin)
    names = {"A": evidence.row_name(a), "B": evidence.row_name(b)}
    if not seeds:
        raise InputError(f"--contrast: neither {names['A']} nor {names['B']} has a finished trial")
    if format == "json":
        tests, by_seed = (json.loads(tables.render(table, "json")) for table in (splits, seeds))
        verdict = asdict(found.judgement)
        print(json.dumps({**names, "verdict": verdict, "splits": tests, "seeds": by_seed, "notes": notes}, indent=1))
    elif format == "csv":
        print(tables.render(seeds, "csv"))
    else:
        titles = [("% " if format == "latex" else "") + f"{letter}: {name}" for letter, name in names.items()]
        print("\n".join([*titles, "", tables.render(splits, format), "", tables.render(seeds, format, notes)]))


def report(directory: Path, out: Path | None = None, format: str = "html", data_dir: Path | None = None) -> int:
    """Writes the report of a study, or its figures."""
    as_html = format == "html"
    out = out or directory / ("report.html" if as_html else "figures")
    if as_html and (out.suffix != ".html" or out.is_dir()):
        raise InputError(f"--out {out}: the name of an .html file is needed")
    if not as_html and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: the name of a directory is needed, for {format}")
    with starting():
        from ablations.results import findings, report
    with status("reading the study; its best network predicts the validation images"):
        found = findings.find(StudyDirectory(directory), data_dir)
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
        from ablations.verify import check_study
        from export.certificate import certificate_problem
        from export.graph import read_onnx
    with status("recomputing the numbers of the study"):
        found = check_study(StudyDirectory(directory))
        files = sorted((directory / "export").glob("*.onnx"))
        problems = list(found.problems)
        for file in files:
            try:
                problem = certificate_problem(read_onnx(file), file)
            except InputError as error:
                problem = str(error)
            problems += [f"export: {problem}"] if problem else []
    for line in [*problems, *found.skipped]:
        print(line)
    print(f"{directory}: {found.checked + len(files)} checks, {len(problems)} do not fit")
    return 1 if problems else 0

"""A study as Arrow tables: a row for each trial, cell, effect, epoch or predicted image. Imports no torch."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from os import PathLike
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.answer import answer
from expertgrid.ablations.results.evidence import read_evidence
from expertgrid.ablations.results.rows import Results, Row, read_results
from expertgrid.ablations.results.scores import JudgedScores
from expertgrid.ablations.results.tables.cells import columns
from expertgrid.ablations.results.tables.scores import score_tables
from expertgrid.ablations.results.tables.study import study_tables
from expertgrid.ablations.study.levels import level_name
from expertgrid.model.system.text import csv_cell, flat_rows, render_tables


class OpenedStudy:
    """A study directory as tables. Each method reads it again, also while it is trained.

    A factor has a column of its name, in which levels keep their types; null is a level that is the base's, or that
    does not matter, as the gate of one expert. `metric` is one to decide by instead of the study's, chosen after
    seeing. `repr`, and the last line of a notebook's cell, show the tables of `expertgrid table`. All raise InputError
    for a directory that holds no study, and for damaged files.
    """

    def __init__(self, path: str | PathLike[str], metric: str | None = None) -> None:
        self.path, self.metric = Path(path), metric
        self._directory = StudyDirectory(self.path)
        self._directory.read_plan()

    def trials(self) -> pa.Table:
        """Each planned trial once: its cell, levels, seed, id, status and all of its record.

        `status` is done, failed, missing, or "other code": of a network that has been changed, and does not count.
        """
        results, rows = read_results(self._directory, self.metric), []
        for row in results.rows:
            for seed, trial in row.trials.items():
                record, failure, adopted = row.by_seed.get(seed), row.failures.get(trial), row.adopted.get(trial)
                status = "done" if record else "failed" if failure else "missing"
                status = "other code" if trial in row.other_code else status
                values: dict[str, object] = {"seed": seed, "trial": trial, "status": status}
                values |= record.model_dump(exclude={"trial", "seed"}) if record else {}
                values |= {"failure": failure and str(failure), "adopted_from": adopted and adopted.directory}
                rows.append(_of_cell(results, row, values))
        return _table(rows)

    def cells(self) -> pa.Table:
        """Each network: the columns of the table of cells, and how many of its trials are planned and (n) finished."""
        evidence = read_evidence(self._directory, self.metric)
        results, rows = evidence.results, []
        for row, values in zip(results.rows, flat_rows(columns(results.rows, evidence))):
            values = {name: value for name, value in values.items() if name not in (*results.study.factors, "model")}
            rows.append(_of_cell(results, row, values | {"n": len(row.by_seed), "planned": row.seeds}))
        return _table(rows)

    def effects(self) -> pa.Table:
        """Each main effect, interaction and declared contrast: its mean, verdict and, after over before, its costs."""
        evidence, rows = read_evidence(self._directory, self.metric), []
        for family, several in (("factors", evidence.effects), ("interactions", evidence.interactions)):
            for effect in several:
                factor, before, after = (" and ".join(words) for words in zip(*effect.changes))
                values = {"family": family, "name": effect.name, "factor": factor, "before": before, "after": after}
                rows.append(values | asdict(effect.judgement) | effect.cost)
        for pair in evidence.declared:
            rows.append({"family": "contrasts", "name": pair.name} | asdict(pair.judgement))
        return _table(flat_rows(rows))

    def epochs(self) -> pa.Table:
        """Each epoch of each trial, also of trials that are not finished."""
        results = read_results(self._directory, self.metric)
        rows = [
            _of_cell(results, row, {"seed": seed, "trial": trial} | dict(epoch))
            for row in results.rows
            for seed, trial in row.trials.items()
            for epoch in self._directory.epochs(trial)
        ]
        return _table(rows)

    def predictions(self) -> pa.Table:
        """The class that each finished trial predicted for each validation and test image, and the image's own.

        `log_probabilities` are lists, of all classes, where trials have them.
        """
        names = {"": "predicted", "_labels": "label", "_flip": "predicted_flip", "_log": "log_probabilities"}
        tables = []
        for row in read_results(self._directory, self.metric).rows:
            for seed, record in row.by_seed.items():
                predicted = self._directory.predictions(record.trial)
                for split in ("validation", "test") if predicted else ():
                    arrays = {name: getattr(predicted, split + suffix) for suffix, name in names.items()}
                    images = pa.array(range(len(arrays["label"])))
                    alike = {"cell": row.name, "seed": seed, "trial": record.trial, "split": split}
                    parts = {name: pa.repeat(value, len(images)) for name, value in alike.items()} | {"image": images}
                    parts |= {name: pa.array(list(of)) for name, of in arrays.items() if of is not None}
                    tables.append(pa.table(parts))
        return pa.concat_tables(tables, promote_options="default")

    def __repr__(self) -> str:
        evidence = read_evidence(self._directory, self.metric)
        tables = render_tables(study_tables(self._directory, evidence), "text")
        return f"{evidence.results.study.question}\n\n{tables}\n\n{answer(evidence)}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


class ShownScores(JudgedScores):
    """Verdicts on scores. `repr`, and the last line of a notebook's cell, show the tables of `expertgrid judge`."""

    def __repr__(self) -> str:
        return render_tables(score_tables(self), "text")

    _repr_html_ = OpenedStudy._repr_html_


def to_bytes(table: pa.Table, format: str) -> bytes:
    """A table as csv or parquet, nothing for another format. In CSV no text is a formula: a quote stands before it."""
    file = io.BytesIO()
    if format == "parquet":
        parquet.write_table(table, file)
    elif format == "csv":
        for place, (name, column) in enumerate(zip(table.column_names, table.columns)):
            if pa.types.is_string(column.type) or pa.types.is_list(column.type):
                texts = (csv_cell(str(value)) if value is not None else None for value in column.to_pylist())
                table = table.set_column(place, name, pa.array(texts, pa.string()))
        csv.write_csv(table, file)
    return file.getvalue()


def _of_cell(results: Results, row: Row, values: Mapping[str, object]) -> dict[str, object]:
    """The columns of a cell and these; `measured_` begins one that has the name of a factor."""
    levels: dict[str, object] = {}
    for factor in results.study.factors:
        several = {level_name(cell.levels[factor]): cell.levels[factor] for cell in row.cells if cell.levels}
        name, level = several.popitem() if len(several) == 1 else ("", None)
        levels[factor] = name if isinstance(level, list | dict) else level
    named = {f"measured_{name}" if name in levels else name: value for name, value in values.items()}
    return {"cell": row.name, "model_name": row.model} | levels | named


def _table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Columns in their order. One of several types has texts, and fields in one another have dotted names."""
    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values: list = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not all(issubclass(kind, int | float) and kind is not bool for kind in kinds):
            values = [None if value is None else level_name(value) for value in values]
        arrays[name] = pa.array(values)
    return pa.table(arrays).flatten().flatten()

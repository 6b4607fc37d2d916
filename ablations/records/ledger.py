"""The file ledger.jsonl: a line for each read of the test split, with its checksum."""

import json
import zlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from expertgrid.ablations.records.reading import damaged
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import whole_lines

LEDGER = "ledger.jsonl"


class TestRead(BaseModel):
    """A line of ledger.jsonl: one read of the test split.

    The line ends in `crc32`: 8 hexadecimal digits, the CRC-32 of the line's JSON without it and without spaces. Lines
    of older versions have none.
    """

    model_config = ConfigDict(extra="forbid")
    __test__ = False  # pytest would take it for a class of tests

    time: str
    trial: str
    reader: str  # "training", "export" or "rerun"
    images: int
    tta: Literal["flip"] | None = None  # "flip": the mirror images were predicted in the same read

    def to_line(self) -> str:
        fields = self.model_dump(mode="json", exclude_none=True)
        return _compact(fields | {"crc32": _crc32(fields)})

    @classmethod
    def of_line(cls, line: bytes) -> "TestRead":
        """Raises InputError for a damaged line."""
        try:
            fields = json.loads(line)
            crc32 = fields.pop("crc32", None)
            if crc32 is not None and crc32 != _crc32(fields):
                raise InputError(f"its checksum is {str(crc32)[:8]}, {_crc32(fields)} follows from the line")
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid("", error, cls.model_fields) from None
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InputError("not a line of a ledger") from None


def _compact(fields: dict[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def _crc32(fields: dict[str, object]) -> str:
    return f"{zlib.crc32(_compact(fields).encode()):08x}"


def read_ledger(ledger: Path) -> list[TestRead]:
    """Each time the test split was read, without one that is being written. Raises InputError for damage."""
    reads = []
    for number, line in enumerate(whole_lines(ledger), 1):
        try:
            reads.append(TestRead.of_line(line))
        except InputError as error:
            raise damaged(ledger, f"line {number}: {error}", "delete the damaged line") from None
    return reads

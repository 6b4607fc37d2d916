"""The file ledger.jsonl: a line for each read of the test split, with its checksum."""

import json
import zlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from expertgrid.ablations.records.reading import damaged
from expertgrid.model.system.errors import InputError, invalid
from expertgrid.model.system.files import whole_lines


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
    def of_line(cls, line: bytes, where: str) -> "TestRead":
        """Raises InputError, naming `where`, for a damaged line."""
        try:
            fields = json.loads(line)
            kept = fields.pop("crc32", None)
            if kept is not None and kept != _crc32(fields):
                raise InputError(f"{where}: its checksum is {str(kept)[:8]}, {_crc32(fields)} follows from the line")
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid(where, error, cls.model_fields) from None
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{where}: not a line of a ledger") from None


def _compact(fields: dict[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def _crc32(fields: dict[str, object]) -> str:
    return f"{zlib.crc32(_compact(fields).encode()):08x}"


def read_ledger(ledger: Path) -> list[TestRead]:
    """Each time the test split was read, without one that is being written. Raises InputError for damage."""
    try:
        return [
            TestRead.of_line(line, f"{ledger}: line {number}")
            for number, line in enumerate(whole_lines(ledger), start=1)
        ]
    except OSError as error:
        raise InputError(f"{ledger}: cannot be read: {error.strerror}") from None
    except InputError as error:
        raise damaged(ledger, error) from None

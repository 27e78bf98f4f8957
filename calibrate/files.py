"""Local text files: ``.txt``, ``.jsonl`` and ``.parquet``, read row by row, every fault told with its place."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
from compress.calibrate.errors import InputError, did_you_mean

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 256  # rows of a parquet column that are in memory at once


def existing_file(spec: str, option: str) -> Path:
    """The path of a readable, non-empty file with a known suffix.

    Raises:
        InputError: no such file (with the nearest name in that folder), a folder, an unknown suffix, an empty file.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        raise InputError(option, spec, "is a folder, not a text file", allowed=", ".join(SUFFIXES))
    if not path.exists():
        raise InputError(option, spec, "no such file", fix=_nearest(path))
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            option,
            spec,
            f"files ending in {path.suffix or 'nothing'!r} can't be read as text",
            allowed=", ".join(SUFFIXES),
            fix="convert it, or rename it if it is plain text",
        )
    if path.stat().st_size == 0:
        raise InputError(option, spec, "the file is empty")
    return path


def cells(path: Path, column: str, option: str, limit: int) -> Iterator[object]:
    """What the file's text column holds, row by row.

    Args:
        path: a file that :func:`existing_file` accepted.
        column: the key or column that holds the text; a ``.txt`` file is one cell.
        option: the option to name in errors.
        limit: how many characters of a ``.txt`` file are read at most.

    Raises:
        InputError: an unreadable or truncated file, text that isn't UTF-8, a missing column.
    """
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    try:
        yield from readers[path.suffix.lower()](path, column, option, limit)
    except OSError as error:
        raise InputError(option, path, f"can't be read ({error.strerror or error})") from error


def missing_column(option: str, spec: object, column: str, columns: list[str]) -> InputError:
    """The error for a text column that the rows don't have."""
    shown = ", ".join(columns[:20])
    return InputError(option, spec, f"there is no column {column!r}", allowed=shown, fix=did_you_mean(column, columns))


def _nearest(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"the folder {path.parent} doesn't exist either"
    return did_you_mean(path.name, sorted(entry.name for entry in path.parent.iterdir()))


def _text(path: Path, column: str, option: str, limit: int) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file.read(limit)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, option, _undecodable_line(path)) from error


def _json_lines(path: Path, column: str, option: str, limit: int) -> Iterator[object]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise _not_utf8(path, option, number) from error
            except json.JSONDecodeError as error:
                cut = "" if line.endswith(b"\n") else "; the file looks truncated"
                raise InputError(option, path, f"line {number} isn't valid JSON ({error.msg}){cut}") from error
            if not isinstance(row, dict):
                raise InputError(option, path, f"line {number} is a {type(row).__name__}, not a JSON object")
            if column not in row:
                raise missing_column(option, f"{path}, line {number}", column, list(row))
            yield row[column]


def _parquet(path: Path, column: str, option: str, limit: int) -> Iterator[object]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise missing_column(option, path, column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(option, path, f"isn't a readable parquet file ({reason})") from error


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if not _is_utf8(line))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(path: Path, option: str, line: int) -> InputError:
    return InputError(option, path, f"line {line} isn't UTF-8 text", fix="convert it with `iconv -t utf-8`")

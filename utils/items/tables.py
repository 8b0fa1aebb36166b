"""Tables as input: CSV, TSV and Parquet, one item per row."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

from utils.errors import ImageError, UserError
from utils.log import LOG, counted

NAMES = {",": "CSV", "\t": "TSV", ";": "CSV, with semicolons", "|": "CSV, with bars", "\0": "CSV of one column"}
_MAX_CELL = 1 << 26  # characters; an unclosed quote turns the rest of the file into one cell
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes decoded with surrogateescape
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]+)?(e[+-][0-9]+)?")


def check_utf8(text: str) -> str:
    """Return `text`, which was decoded with surrogateescape. Raises ValueError if its bytes were not UTF-8."""
    if not text.isascii() and _NOT_UTF8.search(text):
        raise ValueError("it is not UTF-8")
    return text


def find_delimiter(line: str, url_field: str) -> str:
    """The delimiter of a header line that names a column `url_field`; "" for any other line."""
    for delimiter in NAMES:
        with contextlib.suppress(csv.Error):
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
            if url_field in names and (len(names) > 1 or delimiter == "\0"):
                return delimiter
    return ""


def read_table(file: TextIO, delimiter: str, url_field: str) -> Iterator[dict[str, Any] | ImageError]:
    """Yield an item per row. The first line that is not blank names the fields; a column without a name is named after
    its position. A row of another length becomes a bad record.

    A cell becomes a number or boolean if JSON writes this value exactly like the cell. Other cells and the column
    `url_field` stay text.
    """
    csv.field_size_limit(_MAX_CELL)
    rows = csv.reader(file, delimiter=delimiter)
    header = next(row for row in rows if any(map(str.strip, row)))
    names = [check_utf8(name.strip()) or f"column {number}" for number, name in enumerate(header, 1)]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two columns are named {min(repeated)!r}")
    last = rows.line_num
    for cells in rows:
        first, last = last + 1, rows.line_num
        where = f"line {first}" if first == last else f"lines {first} to {last}"
        if any(map(_NOT_UTF8.search, cells)):
            yield ImageError("bad_record", f"{where}: not UTF-8")
        elif len(cells) == len(names):
            yield {name: cell if name == url_field else _value(cell) for name, cell in zip(names, cells)}
        elif cells:
            yield ImageError("bad_record", f"{where}: {counted(len(cells), 'cell')} in place of {len(names)}")


def _value(cell: str) -> str | int | float | bool:
    if cell in ("true", "false"):
        return cell == "true"
    if not _NUMBER.fullmatch(cell):
        return cell
    value = int(cell) if cell.lstrip("-").isdigit() else float(cell)
    return value if json.dumps(value) == cell and math.isfinite(value) else cell


def read_parquet(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield an item per row, without its null fields. Dates and decimals become text; columns of bytes are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"list {file.name} is Parquet, which needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        binary = [field.name for field in table.schema_arrow if "binary" in str(field.type)]
        if binary:
            LOG.info("%s: columns of bytes are left out: %s", file.name, ", ".join(binary))
        columns = [name for name in table.schema_arrow.names if name not in binary]
        for batch in table.iter_batches(1_000, columns=columns):
            for row in batch.to_pylist():
                row = {name: value for name, value in row.items() if value is not None}
                yield json.loads(json.dumps(row, default=str))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None

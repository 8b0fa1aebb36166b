"""The input, read item by item: a folder of images, or a list in one of several forms, told by its first bytes."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from utils.errors import UserError
from utils.items import folder, tables
from utils.items.formatted import item_id, name_url

CHUNK = 1 << 16  # characters read at a time
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"  # first bytes
_BLANKS = " \t\n\r"
_SKIP_BLANKS = re.compile(f"[{_BLANKS}]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:\S|[^\s<>]*[/\\]\S|[^\s<>]+\.[A-Za-z0-9]{2,5}$")  # or a path
_JSON_STRING = re.compile(r'"([^"\\]|\\.)*"')
_EXPECTED = (
    'it must be a JSON list, [{"url": "https://..."}, ...], or JSON lines, one {"url": "https://..."} per line; CSV '
    "with a column url, Parquet, one URL per line and a folder of images work as well"
)
_BROKEN = (ValueError, RecursionError, EOFError, csv.Error, zlib.error)  # raised for a broken file

Reader = Callable[[TextIO], Iterator[Any]]


class Source(NamedTuple):
    """An input. `read` gives its elements, anew at each call; `form` and `notes` are for people.

    An element is any JSON value, or an ImageError for a row that is no item. `identify` gives an element's id, or
    raises ImageError("bad_record").
    """

    path: Path
    form: str
    read: Callable[[], Iterator[Any]]
    identify: Callable[[Any], uuid.UUID]
    is_folder: bool = False
    notes: tuple[str, ...] = ()


def open_source(path: Path, url_field: str = "url", id_field: str = "url") -> Source:
    """The list or folder `path`. Items have their URL in the field `url_field`, elements have it in "url".

    Raises UserError for an unknown form; read() raises UserError where the list is broken.
    """
    if path.is_dir():
        images = folder.find_images(path)
        return Source(path, "a folder of images", images.items, folder.image_id, True, images.notes())
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == _PARQUET:
            form, read = "Parquet", functools.partial(tables.read_parquet, path)
        else:
            form, reader = _find_form(path, url_field)
            read = functools.partial(_read_text, path, reader)
    except FileNotFoundError:
        raise UserError(f"formatted data {path} does not exist; {_EXPECTED}. A demo: python tests/demo.py") from None
    except (OSError, *_BROKEN) as error:
        raise UserError(f"formatted data {path} {_describe(error)}; {_EXPECTED}") from None
    form += ", gzip" if head.startswith(_GZIP) else ""
    identify = functools.partial(item_id, id_field="url" if id_field == url_field else id_field)
    return Source(path, form, functools.partial(_read, path, form, read, url_field), identify)


def _read(path: Path, form: str, read: Callable[[], Iterator[Any]], url_field: str) -> Iterator[Any]:
    n = 0
    try:
        for element in read():
            yield name_url(element, url_field)
            n += 1
    except (OSError, *_BROKEN) as error:
        where = f"after element {n}" if n else "at its beginning"
        raise UserError(
            f"formatted data {path} is broken as {form}, {where}: {_describe(error)}; {_EXPECTED}"
        ) from None


def _describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open_text(path: Path) -> TextIO:
    """The text in a file: UTF-8, -16 or -32, with or without a byte order mark, gzip or not. Line ends stay.

    Bytes that are not UTF-8 become lone surrogates, so that a reader can name their line.
    """
    file = cast(BinaryIO, path.open("rb"))
    is_gzip = file.read(2) == _GZIP
    file.seek(0)
    if is_gzip:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    encoding = json.detect_encoding(file.read(4))
    file.seek(0)
    return io.TextIOWrapper(file, encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict", "")


def _read_text(path: Path, reader: Reader) -> Iterator[Any]:
    with _open_text(path) as file:
        yield from reader(file)


def _find_form(path: Path, url_field: str) -> tuple[str, Reader]:
    """The form of a text and its reader. Raises ValueError for an unknown form."""
    with _open_text(path) as file:
        text, encoding = file.read(CHUNK).lstrip(_BLANKS), file.encoding.upper()
    name, reader = _reader_of(text, url_field)
    return name if encoding == "UTF-8" else f"{name}, {encoding}", reader


def _reader_of(text: str, url_field: str) -> tuple[str, Reader]:
    line = text.splitlines()[0].strip() if text else ""
    if text.startswith("["):
        of_urls = text[1:].lstrip(_BLANKS).startswith('"')
        return ("a JSON list of URLs", _of_urls(_elements, url_field)) if of_urls else ("a JSON list", _elements)
    if text.startswith("{"):
        return "JSON lines", _json_lines
    if delimiter := tables.find_delimiter(line, url_field):
        return tables.NAMES[delimiter], functools.partial(tables.read_table, delimiter=delimiter, url_field=url_field)
    if _JSON_STRING.fullmatch(line):
        return "JSON lines of URLs", _of_urls(_json_lines, url_field)
    if _URL.match(line) and line.isprintable():
        return "URLs, one per line", _of_urls(_lines, url_field)
    raise ValueError("is of no known form" if text else "is empty")


def _of_urls(reader: Reader, url_field: str) -> Reader:
    return lambda file: ({url_field: url} if isinstance(url, str) else url for url in reader(file))


def _lines(file: TextIO) -> Iterator[str]:
    return filter(None, map(str.strip, file))


def _json_lines(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            yield json.loads(tables.check_utf8(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None


def read_list(path: Path, what: str, form: str) -> Iterator[Any]:
    """The elements of the JSON list in `path`. Messages call the file `what` and show the `form` that it must have.

    Raises UserError where the file is broken.
    """
    try:
        yield from _read_text(path, _elements)
    except (OSError, *_BROKEN) as error:
        raise UserError(f"{what} {path} is not a JSON list: {_describe(error)}; it must be {form}") from None


def _elements(file: TextIO) -> Iterator[Any]:
    """The elements of a JSON list, each decoded when it is read whole. Raises ValueError for other text.

    json.load is no faster, and needs 0.66 GB for a million items of 156 bytes, so 6.6 GB for ten million.
    """
    text = file.read(CHUNK).lstrip(_BLANKS)
    if not text.startswith("["):
        raise ValueError("it does not begin with [")
    at, mark, decode = 1, "[", json.JSONDecoder().raw_decode
    while mark != "]":
        try:
            end = _skip_blanks(text, at)
            if mark + text[end] == "[]":
                mark = "]"
            else:
                element, end = decode(text, end)
                end = _skip_blanks(text, end)
                if text[end] not in ",]":  # or a number goes on
                    raise json.JSONDecodeError("no comma after an element", text, end)
                mark = text[end]
                yield element
            at = end + 1
        except (ValueError, IndexError) as error:
            more = file.read(max(CHUNK, len(text) - at))
            if not more:
                raise ValueError(getattr(error, "msg", "it ends early")) from None
            text, at = text[at:] + tables.check_utf8(more), 0
    if (text[at:] + file.read()).strip(_BLANKS):
        raise ValueError("other text follows its end")


def _skip_blanks(text: str, at: int) -> int:
    found = _SKIP_BLANKS.match(text, at)
    return found.end() if found else at

"""Read the input item by item: a folder of images, or a list whose format is recognized by its first characters."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO, cast

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
    'give a JSON list, [{"url": "https://..."}, ...], JSON lines, CSV or Parquet with a column url (or another that '
    "--url-field names), one URL per line, or a folder of images"
)
_BROKEN = (ValueError, RecursionError, EOFError, csv.Error, zlib.error)  # raised for a broken file

Opener = Callable[[], IO[Any]]
Reader = Callable[[Any], Iterator[Any]]


class Source(NamedTuple):
    """An input. Each call of `read` yields all its elements; `format` and `notes` are for people.

    An element is any JSON value, or an ImageError for a row that is not an item. `identify` returns the id of an
    element, or raises ImageError("bad_record"). `is_whole`: whether all folders in and below the input were readable.
    """

    path: Path
    format: str
    read: Callable[[], Iterator[Any]]
    identify: Callable[[Any], uuid.UUID]
    is_folder: bool = False
    notes: tuple[str, ...] = ()
    is_whole: bool = True


def open_source(path: Path, url_field: str = "url", id_field: str = "url") -> Source:
    """Open the list or folder `path`. The list has its URLs in the field `url_field`, and elements have them in "url".

    Raises UserError for an unknown format. read() raises UserError where the list is broken.
    """
    if path.is_dir():
        root = path.resolve()
        files, notes, is_whole = folder.find_images(root)
        read_items = functools.partial(folder.read_items, root, files)
        return Source(path, "a folder of images", read_items, folder.image_id, True, notes, is_whole)
    try:
        name, open_file, reader = _find_format(path, url_field)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {_EXPECTED}. A demo: python tests/demo.py") from None
    except (OSError, *_BROKEN) as error:
        raise UserError(f"list {path}: {_describe(error)}; {_EXPECTED}") from None
    identify = functools.partial(item_id, id_field="url" if id_field == url_field else id_field)
    return Source(path, name, functools.partial(_read, path, name, open_file, reader, url_field), identify)


def _read(path: Path, name: str, open_file: Opener, reader: Reader, url_field: str) -> Iterator[Any]:
    n, has_urls = 0, "URLs" in name
    try:
        with open_file() as file:
            for element in reader(file):
                is_url = has_urls and isinstance(element, str)
                yield {"url": element} if is_url else name_url(element, url_field)
                n += 1
    except (OSError, *_BROKEN) as error:
        problem = f"is broken as {name}, {f'after element {n}' if n else 'at its beginning'}: {_describe(error)}"
        raise UserError(f"list {path} {problem}; {_EXPECTED}") from None


def _describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def _find_format(path: Path, url_field: str) -> tuple[str, Opener, Reader]:
    """(format, opener, reader of the opened file). Raises ValueError for an unknown format."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET:
        return "Parquet", functools.partial(path.open, "rb"), tables.read_parquet
    is_gzip = head.startswith(_GZIP)
    open_text = functools.partial(_open_text, path, gzip.open if is_gzip else open)
    with open_text() as text:
        name, reader = _reader_of(text.read(CHUNK).lstrip(_BLANKS), url_field)
        encoding = text.encoding.upper()
    details = [name, *([encoding] if encoding != "UTF-8" else []), *(["gzip"] if is_gzip else [])]
    return ", ".join(details), open_text, reader


def _open_text(path: Path, opener: Callable[..., Any]) -> TextIO:
    """Open a file as text: UTF-8, -16 or -32, with or without a byte order mark. Line ends stay as they are.

    Bytes that are not UTF-8 become lone surrogates, so that a reader can name their line.
    """
    with opener(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return cast(TextIO, opener(path, "rt", encoding=encoding, errors=errors, newline=""))


def _reader_of(text: str, url_field: str) -> tuple[str, Reader]:
    """(format, reader) of a list that starts with `text`. If the format's name has "URLs", an element may be a URL."""
    line = text.splitlines()[0].strip() if text else ""
    if text.startswith("["):
        return "a JSON list of URLs" if text[1:].lstrip(_BLANKS).startswith('"') else "a JSON list", _elements
    if text.startswith("{"):
        return "JSON lines", _json_lines
    if delimiter := tables.find_delimiter(line, url_field):
        return tables.NAMES[delimiter], functools.partial(tables.read_table, delimiter=delimiter, url_field=url_field)
    if _JSON_STRING.fullmatch(line):
        return "JSON lines of URLs", _json_lines
    if _URL.match(line) and line.isprintable():
        return "URLs, one per line", lambda file: filter(None, map(str.strip, file))
    raise ValueError(f"unknown format, with the first line {line[:80]!r}" if text else "it is empty")


def _json_lines(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            yield json.loads(tables.check_utf8(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None


def _elements(file: TextIO) -> Iterator[Any]:
    """Yield the elements of a JSON list, each as soon as it is read. Raises ValueError for any other text.

    json.load is not faster, and needs 0.66 GB for a million items of 156 bytes, so 6.6 GB for ten million.
    """
    text = file.read(CHUNK).lstrip(_BLANKS)
    at, mark, decode = 1, "[", json.JSONDecoder().raw_decode
    while mark != "]":
        try:
            end = _skip_blanks(text, at)
            if mark + text[end] == "[]":
                mark = "]"
            else:
                element, end = decode(text, end)
                end = _skip_blanks(text, end)
                if text[end] not in ",]":  # a number may continue
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

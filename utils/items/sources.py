"""The input list, read item by item: a JSON list, or JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from utils.errors import UserError

CHUNK = 1 << 16  # characters read at a time
_BLANKS = " \t\n\r"
_SKIP_BLANKS = re.compile(f"[{_BLANKS}]*")
_LIST = '[{"url": "https://..."}, ...]'


def read_items(path: Path) -> Iterator[Any]:
    """The elements of a JSON list, or the lines of a .jsonl file. Raises UserError where the file is broken.

    An element is any JSON value; item_id says whether it is usable.
    """
    if not path.exists():
        raise UserError(
            f"formatted data {path} does not exist; put a JSON list there, {_LIST}, or try the demo: "
            "python tests/demo.py"
        )
    return _read_lines(path) if path.suffix == ".jsonl" else read_list(path, "formatted data", _LIST)


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # decoded line by line, so that a message can name the line
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"formatted data {path}, line {number}, is not JSON: {error}") from None


def read_list(path: Path, what: str, form: str) -> Iterator[Any]:
    """The elements of the JSON list in `path`. Messages call the file `what` and show the `form` that it must have.

    Raises UserError where the file is broken.
    """
    n = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for element in _elements(file):
                yield element
                n += 1
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        where = f"after element {n}" if n else "at its beginning"
        raise UserError(f"{what} {path} is not a JSON list, {where}: {error}; it must be {form}") from None


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
            text, at = text[at:] + more, 0
    if (text[at:] + file.read()).strip(_BLANKS):
        raise ValueError("other text follows its end")


def _skip_blanks(text: str, at: int) -> int:
    found = _SKIP_BLANKS.match(text, at)
    return found.end() if found else at

"""The command line: constants become flags, errors become one line, and this is the only place that exits."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import signal
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, ModuleType
from typing import Any

from utils.errors import UserError
from utils.log import LOG, printable

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken the way of Ctrl-C: the same clean-up, another exit code."""


def parser(doc: str, config: ModuleType, names: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with one flag per constant: kebab-case name, type and default from the constant, help from its comment.

    Dicts and lists are given as JSON; a boolean has a `--no-` form. `doc` is the script's docstring.
    """
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = _comments(config)
    for name in names:
        default = getattr(config, name)
        flag = "--" + name.lower().replace("_", "-")
        text = f"{comments[name]} (default: {json.dumps(default)})".replace("%", "%%")
        if isinstance(default, bool):
            result.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            metavar = type(default).__name__.upper()
            result.add_argument(flag, type=_reader(default), default=default, metavar=metavar, help=text)
    return result


def run(main: Callable[[], int]) -> None:
    """Run a script's main and exit with its code; UserError, Ctrl-C and SIGTERM become one line on stderr."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack letters that a path has
    try:
        code = main()
    except UserError as error:
        code = _say(f"error: {error}", 2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        code = _say(f"error: {error.filename or 'writing'}: {error.strerror or error}", 2)
    except Terminated:
        code = _say("terminated", TERMINATED)
    except KeyboardInterrupt:
        code = _say("interrupted", INTERRUPTED)
    sys.exit(code)


class Stop:
    """How a stoppable block ended: `code` is 0, or the exit code of a script that was stopped."""

    code = 0


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """A block that Ctrl-C or SIGTERM ends, while the script goes on to its summary."""
    stop = Stop()
    try:
        yield stop
    except Terminated:
        stop.code = _say("terminated", TERMINATED)
    except KeyboardInterrupt:
        stop.code = _say("interrupted", INTERRUPTED)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break the clean-up of the first
    raise Terminated


def _say(line: str, code: int) -> int:
    LOG.debug(line, exc_info=True)
    print(printable(line), file=sys.stderr)
    return code


def _reader(default: Any) -> Callable[[str], Any]:
    """What turns a flag's text into a value of the constant's type."""
    if isinstance(default, dict | list):
        return _json_of(type(default))
    return type(default)


def _json_of(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"not a JSON {'object' if kind is dict else 'list'}: {text}")
        return value

    return read


def _comments(config: ModuleType) -> dict[str, str]:
    """Constant name -> the comment on its line: said once in config.py, for its reader and for --help."""
    comments, name = {}, ""
    for token in tokenize.generate_tokens(iter(inspect.getsource(config).splitlines(keepends=True)).__next__):
        if token.type == tokenize.NAME and token.start[1] == 0:  # an annotation's names stand further right
            name = token.string
        elif token.type == tokenize.COMMENT and token.start[1] > 0:
            comments[name] = token.string.lstrip("# ")
    return comments

"""The command line of every script: constants become flags, errors become one line, and only this module exits."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import inspect
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, ModuleType
from typing import Any, NoReturn

from utils.errors import UserError
from utils.log import LOG, printable

INTERRUPTED, TERMINATED = 130, 143

# Every number in config.py must be positive, except that these may be 0 ...
_MAY_BE_0 = """ANN_DIRRIFY_MAX_SIDE ANN_EXPORT_SEED ANN_SEED DOWNLOAD_WORKERS_PER_HOST EMBED_RAY_ACTORS
    IMAGE_CACHE_MAX_BYTES"""
_AT_MOST_1 = ["ANN_DIRRIFY_MAX_SIMILARITY"]  # ... and these must not exceed 1
_MAY_BE_EMPTY = ["ANN_HISTORY_PATH", "IMAGE_CACHE_DIR_PATH", "LOGS_DIR_PATH"]  # other paths must not
_TYPES = {  # of the constants that are not text
    bool: "ANN_DIRRIFY_SHOW_JUDGED DOWNLOAD_ALLOW_LOCAL DOWNLOAD_RESPECT_NOAI",
    dict: "ANN_DIRRIFY_NEIGHBORS_WHERE ANN_DIRRIFY_WHERE ANN_EXPORT_SPLIT ANN_SAMPLER_CFG",
    list: "ANN_DIRRIFY_EXCLUDE_DIRS ANN_DIRRIFY_POOL",
    float: "ANN_DIRRIFY_MAX_SIMILARITY ANN_EXPORT_NEAR_DUPLICATE DOWNLOAD_TIMEOUT_S",
    int: """ANN_DIRRIFY_MAX_SIDE ANN_DIRRIFY_NDIRS ANN_DIRRIFY_NNEAREST ANN_DIRRIFY_PICK_AMONG ANN_EXPORT_SEED ANN_SEED
        BATCH_SIZE DOWNLOAD_ATTEMPTS DOWNLOAD_MAX_BYTES DOWNLOAD_WORKERS DOWNLOAD_WORKERS_PER_HOST EMBED_RAY_ACTORS
        EMBED_RAY_CPUS_PER_ACTOR IMAGE_CACHE_MAX_BYTES MAX_IMAGE_PIXELS""",
}
_WORDS = {bool: "True or False, without quotes", dict: "a dict", list: "a list", str: "text in quotes"}
_WORDS |= {float: "a number, without quotes", int: "a whole number, without quotes"}
_EXAMPLES = {  # for error messages about JSON flags whose default is empty
    "ANN_DIRRIFY_EXCLUDE_DIRS": ["data/dirrify-of-another-reviewer"],
    "ANN_DIRRIFY_NEIGHBORS_WHERE": {"product": "shoe"},
    "ANN_DIRRIFY_POOL": ["images_of_another_model"],
    "ANN_DIRRIFY_WHERE": {"product": "shoe"},
    "ANN_SAMPLER_CFG": {"fields": ["product"]},
}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It is handled like Ctrl-C, but with another exit code."""


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises UserError for an argument that cannot be parsed, a number out of range and an empty path."""
        result = super().parse_args(args, namespace)
        for name, value in vars(result).items():
            if type(value) in (int, float):
                _check_range(name.upper(), value)
            if name.endswith("_path") and not value and name.upper() not in _MAY_BE_EMPTY:
                raise UserError(f"{name.upper()} is empty; it must be a path")
        return result

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists all flags")


def _check_range(name: str, value: float) -> None:
    lowest = 0 if name in _MAY_BE_0.split() else 1 if isinstance(value, int) else sys.float_info.min
    highest = 1 if name in _AT_MOST_1 else math.inf
    if not lowest <= value <= highest:  # also if it is NaN
        words = "more than 0" if 0 < lowest < 1 else f"{lowest} or more"
        raise UserError(f"{name} is {value}; it must be {words}{' and at most 1' if highest == 1 else ''}")


def parser(doc: str, config: ModuleType, names: Iterable[str]) -> argparse.ArgumentParser:
    """Build a parser with one flag per constant, its name in kebab-case. Type, default and help come from config.py.

    Dicts and lists are JSON; a boolean has a `--no-` form; `~` is the home folder. `doc` is the script's docstring.
    """
    result = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^(\w+).*  # (.*)$", inspect.getsource(config), re.MULTILINE))
    for name in names:
        kind, default = _read_constant(config, name)
        flag = "--" + name.lower().replace("_", "-")
        text = f"{comments.get(name, '')} (default: {json.dumps(default)})".replace("%", "%%")
        if kind is bool:
            result.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            reader: Callable[[str], Any] = os.path.expanduser if name.endswith("_PATH") else kind
            if kind in (dict, list):
                reader = _json_reader(kind, default or _EXAMPLES.get(name))
            result.add_argument(flag, type=reader, default=default, metavar=kind.__name__.upper(), help=text)
    return result


def _read_constant(config: ModuleType, name: str) -> tuple[type, Any]:
    """(type, value) of a constant. Raises UserError if it is missing or has another type, as a number in quotes has."""
    if not hasattr(config, name):
        raise UserError(f"{name} is missing in config.py; copy its line from this version's config.py")
    value = getattr(config, name)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    kind = next((kind for kind, names in _TYPES.items() if name in names.split()), str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if kind is float else type(value) is kind):
        raise UserError(f"{name} in config.py is {value!r}; it must be {_WORDS[kind]}")
    return kind, value


def run(main: Callable[[], int], at_once: bool = False) -> None:
    """Run a script's main and exit with its code; UserError, Ctrl-C and SIGTERM become one line on stderr.

    `at_once`: run exit handlers, but skip the interpreter's teardown, which takes over a second once torch is loaded.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # if its encoding lacks a character
    with stoppable() as stop:
        try:
            stop.code = main()
        except UserError as error:
            stop.code = _print_end(f"error: {error}", 2)
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            remedies = {errno.ENOSPC: "; free space there, and run again", errno.EEXIST: "; it must be a folder"}
            name = error.filename2 or error.filename or "writing"  # of a rename, the file to be replaced
            stop.code = _print_end(f"error: {name}: {error.strerror or error}{remedies.get(error.errno or 0, '')}", 2)
    if at_once:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):  # the reader has closed the pipe
            sys.stdout.flush()
        os._exit(stop.code)
    sys.exit(stop.code)


class Stop:
    """The exit code of a stoppable block: 130 after Ctrl-C, 143 after SIGTERM, else 0 or what the block set."""

    code = 0


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the block, but not the script, which can still print its summary."""
    stop = Stop()
    try:
        yield stop
    except Terminated:
        stop.code = _print_end("terminated; run again to continue", TERMINATED)
    except KeyboardInterrupt:
        stop.code = _print_end("interrupted; run again to continue", INTERRUPTED)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    raise Terminated


def _print_end(line: str, code: int) -> int:
    LOG.debug(line, exc_info=True)
    print(printable(line), file=sys.stderr)
    return code


def _json_reader(kind: type[dict] | type[list], example: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text)
            if isinstance(value, kind) and (kind is dict or all(isinstance(element, str) for element in value)):
                return value
        name = "object" if kind is dict else "list of strings"
        raise argparse.ArgumentTypeError(f"{text[:200]} is not a JSON {name}; an example is '{json.dumps(example)}'")

    return read

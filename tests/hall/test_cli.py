from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import config
from tests.conftest import ROOT
from utils import cli
from utils.errors import UserError
from utils.log import counted, printable


def test_flags_have_the_constants_types_and_defaults():
    parser = cli.parser("doc", config, ["BATCH_SIZE", "ANN_SAMPLER_CFG", "DOWNLOAD_ALLOW_LOCAL", "DEVICE"])
    assert vars(parser.parse_args([])) == {
        "batch_size": 32,
        "ann_sampler_cfg": {},
        "download_allow_local": False,
        "device": "auto",
    }
    args = parser.parse_args(["--batch-size", "7", "--ann-sampler-cfg", '{"a": [1]}', "--download-allow-local"])
    assert (args.batch_size, args.ann_sampler_cfg, args.download_allow_local) == (7, {"a": [1]}, True)
    assert not parser.parse_args(["--no-download-allow-local"]).download_allow_local


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--ann-sampler-cfg", "[1]"], r"--ann-sampler-cfg: \[1\] is not a JSON object; an example is '{\"fields\": "),
        (["--ann-sampler-cfg", "{"], "--ann-sampler-cfg: { is not a JSON object; an example is "),
        (
            ["--ann-dirrify-pool", "[2024]"],
            r"--ann-dirrify-pool: \[2024\] is not a JSON list of strings; an example is ",
        ),
        (["--ann-export-split", "{}}"], 'an example is \'{"train": 0.8, '),
        (["--batch-size", "x"], "--batch-size: invalid int value: 'x'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; --help lists all flags"),
    ],
)
def test_an_argument_that_does_not_parse_is_one_line(flags: list[str], line: str):
    parser = cli.parser("doc", config, ["BATCH_SIZE", "ANN_SAMPLER_CFG", "ANN_DIRRIFY_POOL", "ANN_EXPORT_SPLIT"])
    with pytest.raises(UserError, match=line) as raised:
        parser.parse_args(flags)
    assert "\n" not in str(raised.value)


JSON_FLAGS = [name for name, value in vars(config).items() if name.isupper() and isinstance(value, dict | list)]


@pytest.mark.parametrize("name", JSON_FLAGS)
def test_a_flag_that_takes_json_shows_a_useful_example(name: str):
    with pytest.raises(UserError, match=r"is not a JSON (object|list of strings); an example is '[{\[].+[}\]]'"):
        cli.parser("doc", config, [name]).parse_args([f"--{name.lower().replace('_', '-')}", "images"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ANN_DIRRIFY_NDIRS", "0", "1 or more"),
        ("DOWNLOAD_WORKERS_PER_HOST", "-1", "0 or more"),
        ("EMBED_RAY_ACTORS", "-1", "0 or more"),
        ("ANN_SEED", "-1", "0 or more"),
        ("ANN_EXPORT_SEED", "-1", "0 or more"),
        ("DOWNLOAD_TIMEOUT_S", "0.0", "more than 0"),
        ("ANN_EXPORT_NEAR_DUPLICATE", "0.0", "more than 0"),
        ("ANN_DIRRIFY_MAX_SIMILARITY", "1.5", "more than 0 and at most 1"),
        ("ANN_DIRRIFY_MAX_SIMILARITY", "0.0", "more than 0 and at most 1"),
        ("ANN_DIRRIFY_MAX_SIMILARITY", "nan", "more than 0 and at most 1"),
    ],
)
def test_a_number_out_of_its_range_is_one_line(name: str, value: str, words: str):
    with pytest.raises(UserError, match=f"^{name} is {value}; it must be {words}$"):
        cli.parser("doc", config, [name]).parse_args([f"--{name.lower().replace('_', '-')}={value}"])


NUMBERS = [name for name, value in vars(config).items() if type(value) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_of_config_has_a_range_and_is_within_it(name: str, monkeypatch: pytest.MonkeyPatch):
    cli.parser("doc", config, [name]).parse_args([])
    monkeypatch.setattr(config, name, -2)
    with pytest.raises(UserError, match=f"{name} is -2; it must be "):
        cli.parser("doc", config, [name]).parse_args([])


def test_help_gives_each_constants_comment(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.parser("doc", config, ["BATCH_SIZE", "IMAGE_CACHE_MAX_BYTES"]).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "images per forward pass" in text and "10%" in text and "(default: 32)" in text


def run_code(code: str, *, stop: signal.Signals | None = None) -> tuple[int, str, str]:
    """A script whose main is `code`; it is sent `stop` once it has printed a line."""
    lines = ["import sys, time", "from utils import cli", "from utils.errors import UserError", "def main():"]
    script = "\n".join([*lines, *(f"    {line}" for line in code.splitlines()), "cli.run(main)"])
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stdout.readline()
        if stop:
            process.send_signal(stop)
        out, error = process.communicate(timeout=60)
    return process.returncode, first + out, error


def test_how_a_main_ends_is_the_exit_code_and_one_line():
    assert run_code("return 1") == (1, "", "")
    assert run_code("raise UserError('thing: fault\\n\\x1b[2J')") == (2, "", "error: thing: fault\\n\\x1b[2J\n")
    assert run_code("open('/nowhere/at/all')")[::2] == (2, "error: /nowhere/at/all: No such file or directory\n")
    code, _, error = run_code("raise OSError(28, 'No space left on device')")
    assert (code, error) == (2, "error: writing: No space left on device; free space there, and run again\n")
    in_a_folder = "import os, pathlib, tempfile\nos.chdir(tempfile.mkdtemp())\npathlib.Path('a').touch()\n"
    code, _, error = run_code(f"{in_a_folder}os.mkdir('b')\nos.replace('a', 'b')")
    assert (code, error) == (2, "error: b: Is a directory\n"), "the file that was to be replaced"
    code, _, error = run_code(f"{in_a_folder}os.mkdir('a')")
    assert (code, error) == (2, "error: a: File exists; it must be a folder\n")
    code, _, error = run_code("1 / 0")
    assert code == 1 and "ZeroDivisionError" in error, "a bug keeps its traceback"


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent a signal")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_script_says_so_after_its_summary(number: signal.Signals, code: int, word: str):
    wait = "print('ready', flush=True)\ntime.sleep(60)"
    assert run_code(wait, stop=number) == (code, "ready\n", f"{word}; run again to continue\n")
    block = f"with cli.stoppable() as stop:\n    {wait[:27]}\n    time.sleep(60)\nprint('sum')\nreturn stop.code"
    assert run_code(block, stop=number) == (code, "ready\nsum\n", f"{word}; run again to continue\n")


@pytest.mark.skipif(os.name == "nt", reason="no file descriptors to close")
def test_a_script_runs_without_a_terminal():
    """With closed streams, as in pythonw and `2>&-`, Python has None for them."""
    code = (
        "import sys; from utils import cli; cli.run(lambda: len(f'{sys.stdout.write}{sys.stderr.isatty}') and 7, True)"
    )
    closed = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code], cwd=ROOT, timeout=60)
    assert closed.returncode == 7


def test_what_is_printed_cannot_move_the_cursor_and_letters_stay():
    assert printable("a\x1b[2J\r\nb\u202eü\ud800 \x9b%") == "a\\x1b[2J\\r\\nb\\u202eü\\ud800 \\x9b%"
    for letters in ("Müller", "Mu\u0308ller", "\u3000\u00a0 日本", "\U0001f469\u200d\U0001f467", "\ue000"):
        assert printable(letters) == letters


def test_comments_above_a_constant_are_its_help(tmp_path, monkeypatch):
    (tmp_path / "other_config.py").write_text("BATCH_SIZE = 5  # images, 100% of them\n")
    monkeypatch.syspath_prepend(tmp_path)
    module: types.ModuleType = __import__("other_config")
    text = cli.parser("doc", module, ["BATCH_SIZE"]).format_help()
    assert "images, 100% of them (default: 5)" in " ".join(text.split())


def other_config(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> types.ModuleType:
    (folder / "edited_config.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "edited_config", raising=False)
    return importlib.import_module("edited_config")


def test_an_edited_config_needs_no_comments_and_may_hold_paths(tmp_path, monkeypatch):
    text = """from pathlib import Path
A_PATH = Path("a") / "b"
ANN_SAMPLER_CFG = {
    "fields": ["brand"],
}
BATCH_SIZE = 5 # one space
DOWNLOAD_TIMEOUT_S = 0.5
"""
    names = ["A_PATH", "ANN_SAMPLER_CFG", "BATCH_SIZE", "DOWNLOAD_TIMEOUT_S"]
    parser = cli.parser("doc", other_config(tmp_path, monkeypatch, text), names)
    expected = {"a_path": str(Path("a") / "b"), "ann_sampler_cfg": {"fields": ["brand"]}, "batch_size": 5}
    assert vars(parser.parse_args([])) == expected | {"download_timeout_s": 0.5}
    assert "(default: 5)" in parser.format_help()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ANN_SEED = 0", "BATCH_SIZE is missing in config.py; copy its line from this version's config.py"),
        ("BATCH_SIZE = None", "BATCH_SIZE in config.py is None; it must be a whole number, without quotes"),
        ("BATCH_SIZE = '32'", "BATCH_SIZE in config.py is '32'; it must be a whole number, without quotes"),
        ("ANN_SEED = 1.5", "ANN_SEED in config.py is 1.5; it must be a whole number, without quotes"),
        ("ANN_SEED = True", "ANN_SEED in config.py is True; it must be a whole number, without quotes"),
        ("DOWNLOAD_TIMEOUT_S = '9'", "DOWNLOAD_TIMEOUT_S in config.py is '9'; it must be a number, without quotes"),
        (
            "DOWNLOAD_ALLOW_LOCAL = 'False'",
            "DOWNLOAD_ALLOW_LOCAL in config.py is 'False'; it must be True or False, without quotes",
        ),
        ("ANN_DIRRIFY_POOL = 'images'", "ANN_DIRRIFY_POOL in config.py is 'images'; it must be a list"),
        ("ANN_DIRRIFY_WHERE = {1}", "ANN_DIRRIFY_WHERE in config.py is {1}; it must be a dict"),
        ("COLLECTION_NAME = 2026", "COLLECTION_NAME in config.py is 2026; it must be text in quotes"),
        ("LOGS_DIR_PATH = None", "LOGS_DIR_PATH in config.py is None; it must be text in quotes"),
    ],
)
def test_a_constant_that_is_missing_or_has_another_type_is_one_line(tmp_path, monkeypatch, line, fault):
    with pytest.raises(UserError, match=f"^{re.escape(fault)}$"):
        cli.parser("doc", other_config(tmp_path, monkeypatch, line), [fault.split()[0]])


def test_a_tilde_is_the_home_folder_in_flags_and_constants(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    parser = cli.parser(
        "doc", other_config(tmp_path, monkeypatch, "A_PATH = '~/a'\nB_PATH = '~x~'\n"), ["A_PATH", "B_PATH"]
    )
    assert vars(parser.parse_args([])) == {"a_path": f"{tmp_path}/a", "b_path": "~x~"}
    assert parser.parse_args(["--a-path=~"]).a_path == str(tmp_path)


def test_an_empty_path_is_one_line_where_it_does_not_mean_none():
    parser = cli.parser("doc", config, ["ANNOTATED_DATA_PATH", "LOGS_DIR_PATH", "CHROMA_SERVER_URL"])
    assert parser.parse_args(["--logs-dir-path="]).logs_dir_path == ""
    with pytest.raises(UserError, match="ANNOTATED_DATA_PATH is empty; it must be a path"):
        parser.parse_args(["--annotated-data-path", ""])


def test_a_number_and_its_noun_agree():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(n, "untouched directory") for n in (1, 2)] == ["1 untouched directory", "2 untouched directories"]
    assert [counted(n, "file was", "files were") for n in (1, 0)] == ["1 file was", "0 files were"]

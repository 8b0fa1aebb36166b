from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import pytest

import config
from tests.conftest import ROOT
from utils import cli
from utils.log import printable


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


@pytest.mark.parametrize("flags", [["--ann-sampler-cfg", "[1]"], ["--ann-sampler-cfg", "{"], ["--batch-size", "x"]])
def test_a_value_of_another_type_ends_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.parser("doc", config, ["BATCH_SIZE", "ANN_SAMPLER_CFG"]).parse_args(flags)
    assert ended.value.code == 2 and flags[0] in capsys.readouterr().err


def test_help_gives_each_constants_comment(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.parser("doc", config, ["BATCH_SIZE", "IMAGE_CACHE_MAX_BYTES"]).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "images per forward pass" in text and "10% of the disk free" in text and "(default: 32)" in text


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
    assert (code, error) == (2, "error: writing: No space left on device\n")
    code, _, error = run_code("1 / 0")
    assert code == 1 and "ZeroDivisionError" in error, "a bug keeps its traceback"


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent a signal")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_script_says_so_after_its_summary(number: signal.Signals, code: int, word: str):
    wait = "print('ready', flush=True)\ntime.sleep(60)"
    assert run_code(wait, stop=number) == (code, "ready\n", f"{word}\n")
    block = f"with cli.stoppable() as stop:\n    {wait[:27]}\n    time.sleep(60)\nprint('sum')\nreturn stop.code"
    assert run_code(block, stop=number) == (code, "ready\nsum\n", f"{word}\n")


def test_what_is_printed_cannot_move_the_cursor():
    assert printable("a\x1b[2J\r\nb\u202eü\ud800 %") == "a\\x1b[2J\\r\\nb\\u202eü\\ud800 %"


def test_comments_above_a_constant_are_its_help(tmp_path, monkeypatch):
    (tmp_path / "other_config.py").write_text("N = 5  # images, 100% of them\n")
    monkeypatch.syspath_prepend(tmp_path)
    module: types.ModuleType = __import__("other_config")
    assert "images, 100% of them (default: 5)" in " ".join(cli.parser("doc", module, ["N"]).format_help().split())

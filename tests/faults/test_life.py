"""The short form of tests/faults/life.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_a_short_life_in_any_order_keeps_every_promise():
    """In a process of its own: this one may have opened a Chroma client, which no fork survives."""
    command = [sys.executable, "-m", "tests.faults.life", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import UserError
from utils.lock import hold

HOLDER = """
import sys
from pathlib import Path
from utils.lock import hold
with hold(Path(sys.argv[1]), "the store"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_holder_is_told_who_has_it_and_a_dead_one_does_not_block(tmp_path: Path, holder: subprocess.Popen):
    with pytest.raises(UserError) as raised, hold(tmp_path / "lock", "the store"):
        pass
    assert re.match(rf"the store is in use by pid {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d ", str(raised.value))
    holder.kill()
    holder.wait()
    with hold(tmp_path / "lock", "the store"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock.owner").read_text()
    assert not (tmp_path / "lock.owner").exists()


def test_who_waits_gets_it_when_the_holder_ends(tmp_path: Path, holder: subprocess.Popen):
    holder.stdin.close()
    with hold(tmp_path / "lock", "the store", wait_s=60):
        pass


def test_a_garbled_owner_is_just_another_process(tmp_path: Path, holder: subprocess.Popen):
    (tmp_path / "lock.owner").write_text("[]")
    with pytest.raises(UserError, match="in use by another process"), hold(tmp_path / "lock", "the store"):
        pass

"""Rules for the code: the place of files, the direction of imports, and a README that is up to date."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
from utils.errors import REASONS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["embed", "ann_dirrify", "ann_dirload", "ann_export", "ann_report", "ann_train"]
TOP_LEVEL = {"config.py", "samplers.py", "utils", "tests", "requirements.txt", "README.md"}
TOP_LEVEL |= {f"{stage}.py" for stage in STAGES}
SCRIPTS = [ROOT / f"{stage}.py" for stage in STAGES]
UTILS = sorted((ROOT / "utils").rglob("*.py"))
# The rooms of utils/ and the rooms that each may import from. The hall, the modules directly in utils/, is open to all.
ROOMS = {
    "items": {"images"},
    "web": set(),
    "images": set(),
    "store": {"items"},
    "embedding": {"items", "web", "images", "store"},
    "annotation": {"items", "web", "images", "store"},
    "export": {"annotation", "images", "store"},
    "training": {"annotation", "store"},
    "report": {"annotation", "images", "store"},
}
MAX_FILES = 10  # modules of a room, and of the hall
MAX_NAMES = 5  # modules of a room that other rooms import
PRODUCT = [ROOT / "config.py", ROOT / "samplers.py", *SCRIPTS, *UTILS]
OWN = {"config", "samplers", "utils", "tests", *STAGES}
SLOW = {"torch", "torchvision", "open_clip", "chromadb", "timm", "huggingface_hub"}
CONSTANTS = {name: value for name, value in vars(config).items() if name.isupper()}
HELP_LIMIT_S = 1.5

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=STAGES)
each_file = pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path.name}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """The room of a module of utils, "" for the hall."""
    return module.split(".")[1] if module.count(".") == 2 else ""


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef))


def n_lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


# --- where things stand -----------------------------------------------------------------------------------------------
@pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("git")), reason="not a git checkout")
def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name.partition("/")[0] for name in listed.split("\0") if name}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_utils_are_named_for_what_they_hold():
    assert not {path.stem for path in UTILS} & {"helpers", "helper", "common", "misc", "tools", "util", "utils", "base"}


@each_file
def test_functions_stay_short(path):
    assert not [
        function.name for function in functions(path) if n_lines(function) > 60 and function.name != "parse_args"
    ]


@pytest.mark.parametrize("path", [path for path in PRODUCT if path != ROOT / "utils/__init__.py"], ids=str)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(parsed(path))


@each_script
def test_main_reads_like_a_paragraph(path):
    (main,) = [function for function in functions(path) if function.name == "main"]
    assert n_lines(main) <= 25
    assert not [node for node in ast.walk(main) if isinstance(node, ast.Try)]


# --- config -----------------------------------------------------------------------------------------------------------
def test_config_holds_constants_only():
    _, *statements = parsed(ROOT / "config.py").body  # the first is the docstring
    for statement in statements:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        assert all(isinstance(target, ast.Name) and target.id.isupper() for target in targets), ast.unparse(statement)
        assert statement.value is not None
        ast.literal_eval(statement.value)


@each_script
def test_flags_are_the_constants(path):
    flags = vars(importlib.import_module(path.stem).parse_args([]))
    constants = {name.lower(): value for name, value in CONSTANTS.items()}
    assert {name: flags[name] for name in flags if name in constants} == {
        name: constants[name] for name in constants if name in flags
    }
    switches = {name: value for name, value in flags.items() if name not in constants}
    assert not any(switches.values()), "a script's own switches are off unless given"


def test_every_constant_is_some_script_s_flag():
    flags = [name.upper() for stage in STAGES for name in vars(importlib.import_module(stage).parse_args([]))]
    assert set(CONSTANTS) <= set(flags)


@each_script
def test_config_is_read_in_parse_args_only(path):
    tree = parsed(path)
    (reader,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "parse_args"]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "config"]
    assert uses
    assert all(reader.lineno <= node.lineno <= (reader.end_lineno or 0) for node in uses)


# --- direction of imports ---------------------------------------------------------------------------------------------
def test_config_imports_nothing():
    assert not imports(ROOT / "config.py")


@each_script
def test_scripts_import_samplers_and_utils_but_no_script(path):
    assert packages(path) & OWN <= {"config", "samplers", "utils"}


def test_samplers_import_numpy_only():
    assert packages(ROOT / "samplers.py") - set(sys.stdlib_module_names) <= {"numpy"}


def test_utils_import_downward():
    modules = {module_name(path): path for path in UTILS if path.stem != "__init__"}
    graph = {name: imports(path) & set(modules) for name, path in modules.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    for name, path in modules.items():
        assert packages(path) & OWN <= {"utils"}, name
        rooms = {room_of(imported) for imported in graph[name]} - {room_of(name), ""}
        assert rooms <= ROOMS.get(room_of(name), set()), f"{name} imports from {rooms}"


def test_a_room_has_one_job_few_files_and_few_doors():
    assert {path.parent.name for path in UTILS if path.stem == "__init__"} == {"utils", *ROOMS}
    modules = {module_name(path): path for path in UTILS if path.stem != "__init__"}
    for room in ("", *ROOMS):
        inside = [name for name in modules if room_of(name) == room]
        assert len(inside) <= MAX_FILES, room
        if room:
            init = parsed(ROOT / "utils" / room / "__init__.py")
            assert ast.get_docstring(init) and len(init.body) == 1, f"{room}/__init__.py: a docstring and no code"
            used = {name for other, path in modules.items() if room_of(other) != room for name in imports(path)}
            assert len(used & set(inside)) <= MAX_NAMES, f"{room} shows {sorted(used & set(inside))}"


# --- importing does nothing, --help is quick --------------------------------------------------------------------------
def test_importing_does_nothing(tmp_path):
    names = ["config", "samplers", *STAGES, *(module_name(path) for path in UTILS if path.stem != "__init__")]
    code = f"""
import importlib, json, logging, sys, threading
for name in {names}:
    importlib.import_module(name)
handlers = logging.root.handlers + logging.getLogger("retrieval_ann").handlers
print(json.dumps([sorted({SLOW} & set(sys.modules)), len(handlers), threading.active_count()]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [[], 0, 1]
    assert result.stderr == ""
    assert not list(tmp_path.iterdir())


@each_script
def test_help_answers_at_once_and_without_torch(path, tmp_path):
    command = [sys.executable, "-X", "importtime", str(path), "--help"]
    times: list[float] = []
    while not times or (min(times) > HELP_LIMIT_S and len(times) < 3):  # a busy machine may be slow once
        start = time.monotonic()
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        times.append(time.monotonic() - start)
    assert min(times) < HELP_LIMIT_S
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert not modules & SLOW
    assert not list(tmp_path.iterdir())


# --- the README keeps up ----------------------------------------------------------------------------------------------
def test_readme_names_every_stage_and_room():
    names = [*(path.name for path in SCRIPTS), "config.py", "samplers.py", *(f"{room}/" for room in ROOMS)]
    assert not [name for name in names if name not in readme()]


def test_readme_names_every_switch():
    switches = {
        "--" + name.replace("_", "-")
        for stage in STAGES
        for name in vars(importlib.import_module(stage).parse_args([]))
        if name.upper() not in CONSTANTS and name not in ("dirs", "input")  # positional
    }
    assert not [name for name in switches if name not in readme()]


def test_readme_says_what_to_do_about_every_reason():
    assert not [reason for reason in REASONS if f"`{reason}`" not in readme()]


# --- utils/README.md tells the way of a record ------------------------------------------------------------------------
WAYS = {
    "embed": "## How a record moves through embed.py",
    "ann_dirload": "## How a kept id moves through ann_dirload.py",
}


@pytest.mark.parametrize("script", WAYS)
def test_the_ways_in_utils_readme_enter_modules_that_exist_and_import_each_other(script):
    text = (ROOT / "utils" / "README.md").read_text(encoding="utf-8")
    section = text.split(WAYS[script])[1].split("\n## ")[0].strip()
    assert len(section.splitlines()) <= 17  # 15 of the way itself
    entered = list(dict.fromkeys(re.findall(r"`(\w+/\w+)`", section)))
    reached = imports(ROOT / f"{script}.py")
    for name in entered:
        assert (ROOT / "utils" / f"{name}.py").exists(), name
    for name in entered:
        reached |= imports(ROOT / "utils" / f"{name}.py")
    assert {f"utils.{name.replace('/', '.')}" for name in entered} <= reached

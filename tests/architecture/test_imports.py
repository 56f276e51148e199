"""Who may import whom: the architecture's table as data, held against the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "oodmon"

# Ring of each module or folder directly below oodmon/. A module imports from lower rings only;
# within a folder, files may know each other.
RINGS: dict[str, int] = {
    "errors": 0,
    "secret": 0,
    "extras": 0,
    "trust": 1,
    "records": 1,
    "contexts": 2,
    "contracts": 2,
    "registry": 2,
    "wire": 2,
    "calibration": 2,
    "promises": 2,
    "evaluate": 2,
    "ranks": 3,
    "cells": 3,
    "windows": 3,
    "rules": 3,
    "brokers": 3,
    "admission": 3,
    "labelling": 3,
    "pipeline": 4,
    "drift": 4,
    "taps": 4,
    "detectors": 4,
    "feeds": 4,
    "store": 4,
    "sinks": 4,
    "triggers": 4,
    "planning": 5,
    "agent": 5,
    "recipes": 5,
    "fitting": 5,
    "daemon": 5,
    "scoring": 5,
    "config": 5,
    "checks": 5,
    "report": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 6,
}

# One is made of the other.
SAME_RING = {("registry", "contracts"), ("cells", "ranks")}

THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "secret": set(),
    "trust": set(),
    "records": {"numpy"},
    "contexts": {"numpy"},
    "contracts": {"numpy"},
    "registry": {"numpy"},
    "wire": {"numpy", "safetensors"},
    "calibration": {"numpy", "safetensors"},
    "evaluate": {"numpy"},
    "ranks": {"numpy"},
    "promises": set(),
    "cells": {"numpy"},
    "windows": {"numpy"},
    "rules": {"numpy"},
    "brokers": {"kafka"},
    "admission": set(),
    "labelling": {"numpy"},
    "scoring": {"numpy", "torch"},
    "pipeline": {"numpy"},
    "drift": {"numpy", "scipy", "river"},
    "taps": {"numpy", "torch", "safetensors"},
    "detectors": {"numpy", "torch", "safetensors", "faiss"},
    "recipes": {"torch"},
    "fitting": {"numpy", "torch", "safetensors", "PIL"},
    "feeds": {"numpy", "kafka"},
    "store": {"numpy", "sqlalchemy", "alembic"},
    "sinks": {"kafka", "grafana_client", "requests"},
    "triggers": set(),
    "planning": {"numpy", "scipy"},
    "agent": {"numpy", "torch"},
    "daemon": {"numpy", "prometheus_client"},
    "config": {"yaml", "numpy"},
    "checks": {"numpy", "safetensors", "scipy", "torch", "yaml"},
    "report": {"numpy", "jinja2", "matplotlib", "markupsafe", "PIL"},
}

# The two files that make the system known are read whole, so they stay whole.
LONGEST = {"records.py": 495, "contracts.py": 495}

TORCH_ROOMS = {"taps", "detectors", "recipes", "fitting", "agent", "scoring"}
TORCH_FILES = ("checks/detectors", "checks/taps")


def _files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "migrations/versions" not in str(p))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _typing_only(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every imported module, wherever it stands, except for type checking only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _typing_only(node):
            for other in node.orelse:
                yield from _imports(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            if node.module == "oodmon":
                yield from (f"oodmon.{alias.name}" for alias in node.names)
        else:
            yield from _imports(node)


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_inwards(path: Path) -> None:
    room = _room(path)
    assert room in RINGS, f"{room} has no ring: say in the table where it belongs"
    for name in _imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "oodmon":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target == room or target not in RINGS or room in ("cli", "__init__"):
                continue
            assert RINGS[target] < RINGS[room] or (room, target) in SAME_RING, (
                f"{room} (ring {RINGS[room]}) imports {target} (ring {RINGS[target]})"
            )
        elif room in THIRD_PARTY and parts[0] not in sys.stdlib_module_names:
            allowed = THIRD_PARTY[room]
            assert parts[0] in allowed, f"{room} imports {parts[0]}; allowed: {sorted(allowed)}"


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_stays_in_its_rooms(path: Path) -> None:
    inside = str(path.relative_to(PACKAGE))
    if _room(path) in TORCH_ROOMS or inside.startswith(TORCH_FILES) or _room(path) == "cli":
        return
    modules = {name.split(".")[0] for name in _imports(ast.parse(path.read_text()))}
    assert "torch" not in modules


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_shell_reads_clock_and_environment(path: Path) -> None:
    inside = str(path.relative_to(PACKAGE))
    text = path.read_text()
    if inside != "config/parse.py" and _room(path) != "cli":
        assert "os.environ" not in text
        assert "os.getenv" not in text
    if _room(path) not in ("agent", "daemon", "cli"):
        assert "time.time(" not in text
        assert "time.time_ns(" not in text
        assert "datetime.now(" not in text


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    limit = LONGEST.get(str(path.relative_to(PACKAGE)), 360)
    assert len(text.splitlines()) <= limit, "split it by what it is about"
    assert ast.get_docstring(ast.parse(text)), "the first line says what the file is for"
    assert path.stem not in ("utils", "common", "helpers", "misc")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert not node.name.startswith("Base"), node.name
            assert not node.name.endswith(("Manager", "Helper", "Utils")), node.name


def test_the_daemon_half_runs_where_torch_cannot_be_imported() -> None:
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not here")
sys.meta_path.insert(0, Refuse())
import oodmon, oodmon.daemon, oodmon.pipeline, oodmon.config.parse, oodmon.cli
import oodmon.daemon.service, oodmon.store.events, oodmon.config.build
from oodmon import registry
for kind in ("drift", "feeds", "sinks", "triggers"):
    assert registry.kinds[kind].names(), kind
    assert not registry.kinds[kind].broken(), registry.kinds[kind].broken()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    script = """
import sys, oodmon
print([name for name in ("torch", "scipy", "sqlalchemy", "river") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_repository_speaks_of_the_project_alone() -> None:
    words = ("/" + "work/", "pypi" + "-more", "shared" + "/design", "shared" + "/methods")
    for path in ROOT.rglob("*"):
        if ".git" in path.parts or not path.is_file() or ".venv" in str(path):
            continue
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".service"):
            text = path.read_text(errors="ignore")
            assert not [word for word in words if word in text], path

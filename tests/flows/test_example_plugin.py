"""The example detector as a user meets it: installed by pip, found by name, held to account."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins" / "oodmon-example-detector"
PUBLIC = {"oodmon", "oodmon.checks", "oodmon.contracts", "oodmon.detectors", "oodmon.errors"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the plugin beside oodmon."""
    pytest.importorskip("hatchling", reason="builds the plugin without the network")
    source = tmp_path_factory.mktemp("source") / PLUGIN.name
    target = tmp_path_factory.mktemp("site")
    # A copy: building must leave nothing in the checkout.
    subprocess.run(["cp", "-r", str(PLUGIN), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found_by_name_and_passes_every_check(installed: dict[str, str]) -> None:
    script = (
        "from oodmon.registry import detectors\n"
        "from oodmon.checks import conform\n"
        "assert 'cosine_mean' in detectors.names(), detectors.names()\n"
        "assert not detectors.broken(), detectors.broken()\n"
        "outcomes = conform('detectors', 'cosine_mean')\n"
        "print(len(outcomes), [outcome for outcome in outcomes if not outcome.passed])\n"
    )
    count, failed = run(installed, "-c", script).split(maxsplit=1)
    assert int(count) >= 15
    assert failed.strip() == "[]"


def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    output = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=PLUGIN)
    assert "passed" in output


def test_it_imports_public_names_only() -> None:
    for path in PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "oodmon":
                assert node.module in PUBLIC, f"{path.name} imports from {node.module}"
                module = __import__(node.module, fromlist=["__all__"])
                for alias in node.names:
                    assert alias.name in module.__all__, f"{node.module}.{alias.name}"

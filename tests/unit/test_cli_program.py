"""The command itself: quick to start, one message for a failure, an exit status that means it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from oodmon import __version__
from oodmon.cli import main, program, start
from oodmon.cli.options import Duration, when
from oodmon.errors import StoreError
from oodmon.extras import EXTRAS, install

DAEMON = """\
model: {name: digits}
daemon: {feed: {type: spool, path: spool/}, calibration: {path: states/}, drift: {a: {type: ks}}}
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="oodmon")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom oodmon.cli import main\n"
        "try:\n    main(['--help'], prog_name='oodmon')\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'yaml', 'sqlalchemy', 'rich', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "grafana" in done.stdout


@pytest.mark.parametrize("verb", list(program._VERBS))
def test_every_verb_has_help(verb: str) -> None:
    shown = call(verb, "--help")
    assert shown.exit_code == 0
    assert f"Usage: oodmon {verb}" in shown.output


def test_version() -> None:
    assert __version__ in call("--version").output
    done = subprocess.run(
        [sys.executable, "-m", "oodmon", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"oodmon, version {__version__}"


def test_a_config_problem_is_status_2_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "oodmon.yaml"
    path.write_text("model: {nam: x}\n")
    shown = call("check", str(path))
    assert shown.exit_code == 2
    lines = shown.stderr.splitlines()
    assert lines[0] == f"{path}:1:1: neither `agent` nor `daemon` is here; one of them is needed"
    assert lines[-1] == "3 problems"
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StoreError("the database is away"), 1, "oodmon: the database is away\n"),
        (OSError(28, "No space left on device", "/x"), 1, "oodmon: /x: No space left on device\n"),
        (
            ZeroDivisionError("by zero"),
            1,
            "oodmon: unexpected ZeroDivisionError: by zero (`oodmon --debug …` shows where)\n",
        ),
        (
            ModuleNotFoundError("No module named 'jinja2'", name="jinja2"),
            2,
            "oodmon: jinja2 is not installed: pip install 'oodmon[report]'\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failure_is_one_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(program.Program, "get_command", lambda *_: fails)
    shown = call("fails")
    assert (shown.exit_code, shown.stderr) == (status, said)
    if isinstance(error, Exception):
        assert call("--debug", "fails").exception is error


def test_an_unknown_verb_is_status_2() -> None:
    shown = call("chek")
    assert shown.exit_code == 2
    assert "No such command 'chek'" in shown.stderr


def test_check_tells_the_parts_and_the_hints(tmp_path: Path) -> None:
    path = tmp_path / "oodmon.yaml"
    path.write_text(DAEMON)
    shown = call("check", str(path))
    assert shown.exit_code == 0
    assert "daemon: 1 drift test, 0 rules, 0 sinks, 0 triggers" in shown.stdout
    assert "hint: daemon.drift.a: no rule reads it" in shown.stderr
    assert call("check", "--strict", str(path)).exit_code == 2


def test_check_skips_the_agent_half_where_torch_is_not(tmp_path: Path) -> None:
    path = tmp_path / "oodmon.yaml"
    path.write_text(
        DAEMON + "agent: {detectors: {msp: {type: msp}}, states: s, feed: {type: no}}\n"
    )
    done = without_torch("check", str(path))
    assert done.returncode == 0, done.stderr
    assert "agent: skipped, torch is not installed" in done.stdout


def test_extras_that_messages_name_exist() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) == set(project["optional-dependencies"]) - {"all"}
    assert install("torch.nn") == "pip install 'oodmon[torch]'"
    assert not install("nowhere")


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import importlib.util, sys\nreal = importlib.util.find_spec\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'torch' else real(n, *a)\n"
        f"from oodmon.cli import main\nmain({list(arguments)!r}, prog_name='oodmon')\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_without_torch_the_catalog_blames_no_part() -> None:
    done = without_torch("catalog", "--json")
    broken = {row["name"]: row["broken"] for row in json.loads(done.stdout) if "broken" in row}
    built_in = {name: why for name, why in broken.items() if name.startswith("built-in")}
    assert set(built_in) == {"built-in taps", "built-in detectors"}
    assert set(built_in.values()) == {"torch is not installed: pip install 'oodmon[torch]'"}
    assert not {"gram", "hooks"} & set(broken)


@pytest.mark.parametrize(
    "arguments", [("conform", "detectors.msp"), ("init", "new.yaml", "--model", "a:b")]
)
def test_a_verb_that_needs_torch_says_how_to_get_it(arguments: tuple[str, ...]) -> None:
    done = without_torch(*arguments)
    assert done.returncode == 2
    assert "pip install 'oodmon[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("shop.digits:make_digits", "make_digits"),
        ("shop.digits:model", "digits"),
        ("net:net", "net"),
    ],
)
def test_a_model_is_called_by_what_says_most(model: str, name: str) -> None:
    assert start._called(model) == name


def test_catalog_lists_every_kind_and_says_what_options_take() -> None:
    shown = call("catalog", "--json")
    rows = json.loads(shown.stdout)
    assert {row["kind"] for row in rows} == {
        "taps", "detectors", "feeds", "drift", "sinks", "triggers"
    }  # fmt: skip
    (spool,) = [row for row in rows if (row["kind"], row["name"]) == ("feeds", "spool")]
    assert {"name": "path", "takes": "text", "default": None} in spool["options"]
    (msp,) = [row for row in rows if row["name"] == "msp"]
    assert (msp["reads"], msp["cost"]) == ("logits", "C")
    assert msp["paper"].endswith("ICLR 2017")
    assert "reads a layer, labels while learning · costs C·D · " in call("catalog").stdout
    told = call("catalog", "sinks", "--options").stdout
    assert "bootstrap_servers: a list, each text (required)" in told


def test_catalog_lists_a_broken_plugin_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from oodmon.registry import sinks

    monkeypatch.setattr(sinks, "_broken", {"mine": "mine.sink: No module named 'nowhere'"})
    assert "broken: mine.sink: No module named 'nowhere'" in call("catalog", "sinks").stdout


def test_conform_reports_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = call("conform", "sinks.log")
    assert shown.exit_code == 0, shown.output
    assert "checks passed" in shown.stdout
    from oodmon.sinks.log import Log

    monkeypatch.setattr(Log, "close", lambda _: 1 / 0)
    broken = call("conform", "--quiet", "sinks.log")
    assert broken.exit_code == 1
    assert "FAIL sinks.log" in broken.stdout
    assert call("conform", "pipes.log").exit_code == 2


def test_what_a_check_provokes_is_not_shown_as_a_failure() -> None:
    """In a process of its own: here pytest takes the log."""
    command = [sys.executable, "-m", "oodmon", "conform", "--quiet", "taps.hooks"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    assert re.fullmatch(r"(\d+) of \1 checks passed\n", shown.stdout)


def test_grafana_push_needs_to_know_where(tmp_path: Path) -> None:
    assert "where is Grafana?" in call("grafana", "push").stderr
    path = tmp_path / "oodmon.yaml"
    path.write_text(DAEMON)
    assert "has no sink of type grafana" in call("grafana", "push", "-c", str(path)).stderr


def test_there_is_no_status_before_the_first_run(tmp_path: Path) -> None:
    path = tmp_path / "oodmon.yaml"
    path.write_text(DAEMON)
    for verb in ("status", "tail", "report", "replay"):
        shown = call(verb, str(path))
        assert shown.exit_code == 1
        assert "there is no database" in shown.stderr
        assert not (tmp_path / "oodmon.db").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("6h", 21_600), ("7d", 604_800)]
)
def test_spans(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds
    with pytest.raises(click.BadParameter):
        Duration().convert(f"{text}x", None, None)


def test_times_that_are_not_known() -> None:
    assert when(0) == "-"
    assert len(when(1_700_000_000_000_000_000)) == len("2023-11-14 22:13:20")

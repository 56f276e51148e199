"""Mistakes that people make when they fit: each is told in words, with a status, and no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.cli import main

torch = pytest.importorskip("torch")

MODULE = "code_of_the_cli_mistakes"
CODE = """
import numpy as np, torch

torch.manual_seed(0)
net = torch.nn.Sequential()
net.add_module("features", torch.nn.Linear(4, 8))
net.add_module("fc", torch.nn.Linear(8, 3))
inputs = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
right = net(torch.tensor(inputs)).argmax(1).numpy()

def reference(): return net, (inputs, right)
def wide(): return net, (np.ones((80, 5), np.float32), right)
def bytes_(): return net, (np.ones((80, 4), np.uint8), right)
def words(): return net, (inputs, np.array(["cat"] * 80))
def wrong(): return net, (inputs, (right + 1) % 3)
def holes():
    broken = inputs.copy()
    broken[::4] = np.nan
    return net, (broken, right)
def raises(): raise LookupError("the bucket is empty")
def no_model(): raise LookupError("no weights")
"""
CONFIG = """\
model: {name: tiny}
agent:
  detectors: {energy: {type: energy}}
  states: states/
  feed: {type: spool, path: spool/}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    (tmp_path / "oodmon.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop(MODULE, None)


def fit(function: str, *more: str) -> Result:
    data = function if "." in function else f"{MODULE}:{function}"
    arguments = ["fit", "oodmon.yaml", data, "--no-advice", *more]
    return CliRunner().invoke(main, arguments, prog_name="oodmon")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wide", "the model cannot be called with (float32 (80, 5)), which the data gives"),
        ("bytes_", "the model cannot be called with (uint8 (80, 4)), which the data gives"),
        ("words", "labels: expected numbers, found <U3 (80,)"),
        ("raises", f"DATA: {MODULE}:raises raised LookupError: the bucket is empty"),
        ("refrence", "has no 'refrence'; did you mean `reference`?"),
        ("none.npz", "DATA: there is no none.npz"),
        ("torn.npz", "torn.npz: not a readable .npz file"),
    ],
)
def test_data_that_cannot_be_used(project: Path, function: str, said: str) -> None:
    (project / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    more = ("--model", f"{MODULE}:net") if function.endswith("npz") else ()
    shown = fit(function, *more)
    assert shown.exit_code == 2, shown.output
    assert said in shown.stderr
    assert "unexpected" not in shown.stderr
    assert not (project / "states").exists()


def test_a_model_that_cannot_be_made(project: Path) -> None:
    shown = fit("raises", "--model", f"{MODULE}:no_model")
    assert "raised LookupError: the bucket is empty" in shown.stderr
    np.savez(project / "data.npz", inputs=np.zeros((80, 4), np.float32))
    shown = fit("data.npz", "--model", f"{MODULE}:no_model")
    assert shown.exit_code == 2
    assert f"--model: {MODULE}:no_model raised LookupError: no weights" in shown.stderr


def test_debug_shows_the_users_own_error(project: Path) -> None:
    arguments = ["--debug", "fit", "oodmon.yaml", f"{MODULE}:raises"]
    error = CliRunner().invoke(main, arguments, prog_name="oodmon").exception
    assert isinstance(error, LookupError)


def test_a_model_no_better_than_guessing_is_told(project: Path) -> None:
    shown = fit("wrong")
    assert shown.exit_code == 0, shown.output
    assert "no better than guessing" in shown.stderr
    assert "no better than guessing" not in fit("reference").stderr


def test_data_with_holes_is_told(project: Path) -> None:
    shown = fit("holes")
    assert shown.exit_code == 0, shown.output
    assert "of the held-out samples could not be scored" in shown.stderr
    assert "could not be scored" not in fit("reference").stderr


def test_states_of_another_model_are_neither_replaced_nor_run(project: Path) -> None:
    import oodmon
    from oodmon.errors import StateError

    assert fit("reference").exit_code == 0
    before = (project / "states" / "energy.safetensors").read_bytes()
    (project / "oodmon.yaml").write_text(CONFIG.replace("tiny", "other"))
    shown = fit("reference")
    assert shown.exit_code == 2
    assert "was learnt for model 'tiny', this config is of 'other'" in shown.stderr
    assert (project / "states" / "energy.safetensors").read_bytes() == before
    with pytest.raises(StateError, match="was fitted for model 'tiny' version '1', the config is"):
        oodmon.attach(torch.nn.Linear(4, 3), project / "oodmon.yaml")


def test_a_new_version_has_to_be_fitted(project: Path) -> None:
    import oodmon
    from oodmon.errors import StateError

    assert fit("reference").exit_code == 0
    (project / "oodmon.yaml").write_text(CONFIG.replace("tiny", 'tiny, version: "2"'))
    with pytest.raises(StateError, match="the config is of 'tiny' version '2'; run `oodmon fit"):
        oodmon.attach(torch.nn.Linear(4, 3), project / "oodmon.yaml")
    assert fit("reference").exit_code == 0
    oodmon.attach(torch.nn.Linear(4, 3), project / "oodmon.yaml").detach()

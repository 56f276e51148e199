"""`oodmon advise` and what `oodmon fit` adds: the table, JSON, plain messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from oodmon.cli import main

torch = pytest.importorskip("torch")

USER_CODE = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential()
net.add_module("body", nn.Sequential(nn.Linear(6, 12), nn.ReLU()))
net.add_module("fc", nn.Linear(12, 4))
inputs = torch.randn(200, 6)

def reference():
    return net, (inputs, net(inputs).argmax(1))

def unlabelled():
    return net, inputs

def loader():
    return net, [(inputs[:100], None), (inputs[100:], None)]

def few():
    return net, (inputs[:10], torch.zeros(10, dtype=torch.int64))
"""

CONFIG = """
model: {name: net, version: "1"}
agent:
  tap: {type: hooks, layers: auto}
  detectors:
    sure: {type: msp}
    far: {type: mahalanobis, labels: predicted}
  states: states/
  feed: {type: spool, path: spool/}
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="oodmon")


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("advised")
    (folder / "net_of_the_advice.py").write_text(USER_CODE)
    (folder / "oodmon.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("COLUMNS", "160")
        yield


def advise(what: str, *options: str) -> Result:
    return call("advise", *options, "oodmon.yaml", f"net_of_the_advice:{what}")


def row(shown: Result, name: str) -> str:
    """The detector's line of the first table."""
    return next(ln for ln in shown.stdout.splitlines() if re.match(rf"[• ] +{name} ", ln))


def test_configured_and_quick_detectors_are_tried_and_nothing_is_written() -> None:
    found = advise("reference", "--json", "--budget", "1000")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert {"sure", "far", "energy", "vim"} <= set(told["detectors"])
    assert "msp" not in told["detectors"]  # it is there as `sure`
    assert told["detectors"]["far"]["options"]["labels"] == "predicted"
    assert told["changes"] == ["noise", "stretched", "mixed", "lost", "unseen class"]
    assert told["proposed"]
    assert "deep_svdd" in told["not_tried"]
    assert not Path("states").exists()


def test_the_table_shows_the_figures_and_the_proposed_set() -> None:
    options = ("--configured", "--budget", "1000", "--seed", "3")
    told = json.loads(advise("reference", "--json", *options).stdout)
    shown = advise("reference", *options)
    assert shown.exit_code == 0, shown.output
    for name in ("sure", "far"):
        line = row(shown, name)
        for value in told["detectors"][name]["auroc"].values():
            assert f"{value:.3f}" in line
    # the costs are measured anew, so the set may be another
    (proposed,) = re.findall(r"proposed for 1e\+03 µs per sample: (.+), [\d.]+ µs", shown.stdout)
    for name in ("sure", "far"):
        assert (name in proposed.split(", ")) == row(shown, name).startswith("•")
    assert "not tried" not in shown.stdout


def test_a_narrow_terminal_cuts_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = advise("reference", "--configured", "--budget", "1000")
    line = row(shown, "far")
    assert "…" not in shown.stdout
    assert len(line.split()) >= 7
    heads = "\n".join(shown.stdout.splitlines()[1:3]).split()
    assert {"noise", "stretched", "mixed", "lost", "unseen", "class"} <= set(heads), "folded"


def test_no_set_for_too_small_a_budget_says_what_the_cheapest_takes() -> None:
    shown = advise("unlabelled", "--configured", "--budget", "0.000001")
    assert shown.exit_code == 0, shown.output
    assert "nothing to propose for 1e-06 µs per sample: the cheapest, " in shown.stdout
    assert "unseen class" not in shown.stdout


def test_fit_tells_what_the_detectors_react_to_unless_told_not_to() -> None:
    told = call("fit", "oodmon.yaml", "net_of_the_advice:reference")
    assert told.exit_code == 0, told.output
    assert "AUROC" in told.stdout
    assert "`oodmon advise` tries every other detector" in told.stdout
    head = next(line for line in told.stdout.splitlines() if "detector" in line and "mean" in line)
    assert "unseen class" in head
    assert "which learn again from " in told.stdout
    assert not re.search(r"–", row(told, "far")), "it was shown an unseen class too"
    silent = call("fit", "--no-advice", "oodmon.yaml", "net_of_the_advice:reference")
    assert silent.exit_code == 0
    assert "AUROC" not in silent.stdout
    assert "oodmon advise" not in silent.stdout


def test_fit_has_nobody_learn_again_without_labels_or_in_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlabelled = call("fit", "oodmon.yaml", "net_of_the_advice:unlabelled")
    assert "AUROC" in unlabelled.stdout
    assert "unseen class" not in unlabelled.stdout
    monkeypatch.setattr("oodmon.cli.advise._QUICK_LEARNT", -1.0)
    slow = call("fit", "oodmon.yaml", "net_of_the_advice:reference")
    assert "AUROC" in slow.stdout
    assert "unseen class" not in slow.stdout


def test_fit_reads_no_data_again_of_which_it_cannot_know_the_size() -> None:
    told = call("fit", "oodmon.yaml", "net_of_the_advice:loader")
    assert told.exit_code == 0, told.output
    assert "AUROC" not in told.stdout
    assert "`oodmon advise`" in told.stdout


def test_too_little_data_spoils_no_fit_and_is_told_by_advise() -> None:
    fitted = call("fit", "oodmon.yaml", "net_of_the_advice:few")
    assert fitted.exit_code == 0, fitted.output
    assert "no advice: " in fitted.stdout
    asked = advise("few")
    assert asked.exit_code == 2
    assert "too few" in asked.output

"""Known outliers in a reference: some detectors learn from them, the others never see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.cli import main

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from oodmon.contracts import Detector  # noqa: E402
from oodmon.detectors import Reference, Scorer  # noqa: E402
from oodmon.detectors.outliers import takes_outliers  # noqa: E402
from oodmon.evaluate import auroc  # noqa: E402
from oodmon.fitting.sampled import sampled  # noqa: E402
from oodmon.fitting.sources import from_data  # noqa: E402
from oodmon.records import Activations  # noqa: E402
from oodmon.registry import detectors  # noqa: E402

ROWS, OUTLIERS, WIDTH = 240, 40, 8


def rows(count: int, seed: int, *, strange: bool = False) -> Tensor:
    """Two directions of spread; what is strange lies along a third, near the middle."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.full((WIDTH,), 0.1)
    spread[:2] = 1.0
    found: Tensor = torch.randn((count, WIDTH), generator=draw) * spread
    found[:, 2].add_(0.5 if strange else 0.0)
    return found


def mixed() -> tuple[Tensor, Tensor]:
    """Usual rows, and between them known outliers."""
    inputs = torch.cat([rows(ROWS, 0), rows(OUTLIERS, 1, strange=True)])
    labels = torch.cat([torch.arange(ROWS) % 2, torch.full((OUTLIERS,), -1)])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(2))
    return inputs[order], labels[order]


def reference(inputs: Tensor, labels: Tensor) -> Reference:
    return Reference.from_arrays({"f": inputs}, inputs[:, :2], inputs, labels, batch_size=64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mahalanobis", {"layer": "f"}),
        ("knn", {"layer": "f", "k": 3}),
        ("deep_svdd", {"layer": "f", "epochs": 2, "pretraining": 1, "outputs": 4}),
        ("combine", {"of": ("energy", "cosine(layer=f)")}),
    ],
)
def test_whoever_cannot_learn_from_outliers_never_sees_them(
    name: str, options: dict[str, Any]
) -> None:
    inputs, labels = mixed()
    detector = detectors.create(name, **options)
    assert not takes_outliers(detector)
    told = Scorer.learn(detector, reference(inputs, labels))
    usual = labels >= 0
    alone = Scorer.learn(detector, reference(inputs[usual], labels[usual]))
    fresh = Activations({"f": rows(50, 3)}, rows(50, 3)[:, :2])
    if name == "combine":  # which rows its parts take depends on the rows of a batch
        assert told.state["ranks"].numel() <= 2 * ROWS
    else:
        torch.testing.assert_close(told.score(fresh), alone.score(fresh), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_deep_sad_and_what_holds_it_learn_from_them(wrapped: bool) -> None:
    inputs, labels = mixed()
    options = "layer=f, epochs=20, pretraining=3, outputs=4, learning_rate=0.003"
    detector: Detector = detectors.create("combine", of=(f"deep_sad({options})", "knn(layer=f)"))
    if not wrapped:
        detector = detector.members()[0]  # type: ignore[attr-defined]
    assert takes_outliers(detector)
    usual, fresh, strange = labels >= 0, rows(200, 4), rows(200, 5, strange=True)

    def seen(given: Reference) -> float:
        scorer = Scorer.learn(detector, given)
        inside, outside = (
            scorer.score(Activations({"f": part})).numpy() for part in (fresh, strange)
        )
        return float(auroc(inside, outside))

    assert seen(reference(inputs, labels)) > seen(reference(inputs[usual], labels[usual])) + 0.05


def test_advice_is_asked_of_usual_samples_alone() -> None:
    inputs, labels = mixed()
    source = from_data((inputs, labels), batch_size=50, seed=0)
    for part in sampled(source, 500, 500, learn_share=0.5, seed=0):
        found = torch.cat([batch.labels for batch in part if batch.labels is not None])
        assert int(found.min()) >= 0
        assert 0 < len(found) < ROWS


MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("body", nn.Sequential(nn.Linear(8, 16), nn.ReLU()))
    made.add_module("fc", nn.Linear(16, 2))
    return made
"""

DETECTORS = """
    sad: {type: deep_sad, on: inputs, epochs: 20, pretraining: 3, outputs: 4, learning_rate: 0.003}
    near: {type: knn}
  states:"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="oodmon")


def test_fit_takes_them_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net_of_the_outliers.py").write_text(MODEL)
    made = call("init", "--model", "net_of_the_outliers:model", "--name", "net")
    assert made.exit_code == 0, made.output
    config = tmp_path / "oodmon.yaml"
    before, _, after = config.read_text().partition("    msp: ")
    config.write_text(before.rstrip() + DETECTORS + after.partition("  states:")[2])
    inputs, labels = mixed()
    found = {}
    for told, given in (("told", labels), ("not", torch.where(labels < 0, -2, labels))):
        np.savez(tmp_path / f"{told}.npz", inputs=inputs.numpy(), labels=given.numpy())
        shown = call(
            *("fit", "oodmon.yaml", f"{told}.npz", "--model", "net_of_the_outliers:model"),
            "--no-advice",
        )
        assert shown.exit_code == 0, shown.output
        assert (f"and {OUTLIERS} known outliers" in shown.output) == (told == "told")
        scorer = Scorer.load(tmp_path / "states" / "sad.safetensors")
        inside, outside = (
            scorer.score(Activations(inputs=part)).numpy()
            for part in (rows(200, 4), rows(200, 5, strange=True))
        )
        found[told] = float(auroc(inside, outside))
    assert found["told"] > found["not"] + 0.05

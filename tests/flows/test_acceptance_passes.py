"""The acceptance experiments A3 (ODIN), C2 (Generalized ODIN) and C12 (ensembles), per seed.

FashionMNIST is known; MNIST, KMNIST and notMNIST are novel. The figures are in docs/acceptance.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples import fashion_mnist as example
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from oodmon.recipes.deconf import DeConf, DeConfModel
from oodmon.records import Activations
from oodmon.registry import detectors
from oodmon.taps.twin import Twin
from tests.data import data_path
from tests.fashion import SEEDS, classifier
from tests.fashion import sets as fashion_sets
from tests.figures import Figures

SLICE = 250

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def sets() -> Mapping[str, example.Images]:
    folder = data_path("fashion_mnist_train.npz").parent
    held_out = example.load(folder, "fashion_mnist_test", 2 * example.TEST_ROWS)
    return {**fashion_sets(), "held out": held_out}


def passes(model: nn.Module, images: Tensor) -> Iterator[Activations]:
    """What the shadow worker hands to a detector."""
    twin = Twin(model)
    for start in range(0, len(images), SLICE):
        inputs = images[start : start + SLICE]
        with torch.inference_mode():
            logits = model(inputs)
        yield Activations(logits=logits, inputs=inputs, probe=twin)


def scores(scorer: Scorer, model: nn.Module, images: Tensor) -> np.ndarray[Any, Any]:
    return torch.cat([scorer.score(acts) for acts in passes(model, images)]).numpy()


def aurocs(
    scorer: Scorer, model: nn.Module, sets: Mapping[str, example.Images]
) -> dict[str, float]:
    inside = scores(scorer, model, sets["ID"].inputs)
    return {name: auroc(inside, scores(scorer, model, sets[name].inputs)) for name in example.OODS}


@pytest.mark.parametrize("seed", SEEDS)
def test_odin(sets: Mapping[str, example.Images], seed: int, figures: Figures) -> None:
    model = nn.Sequential(*classifier(seed)).eval()
    msp = Scorer(detectors.create("msp"), {})
    plain = aurocs(msp, model, sets)["MNIST"]
    for epsilon in (0.0, 0.001, 0.005):
        odin = Scorer(detectors.create("odin", epsilon=epsilon), {})
        gain = aurocs(odin, model, sets)["MNIST"] - plain
        least = 0.03 if epsilon <= 0.001 else 0.0
        what = f"odin, T 1000, ε {epsilon}, above msp: MNIST"
        figures.hold("A3", what, gain, seed=seed, least=least)

    same = Scorer(detectors.create("odin", temperature=1.0, epsilon=0.0), {})
    inputs = sets["ID"].inputs
    np.testing.assert_array_equal(scores(same, model, inputs), scores(msp, model, inputs))

    # The step raises the mean probability of the predicted class.
    still = scores(
        Scorer(detectors.create("odin", temperature=1.0, epsilon=0.0), {}), model, inputs
    )
    moved = scores(
        Scorer(detectors.create("odin", temperature=1.0, epsilon=0.001), {}), model, inputs
    )
    assert -np.expm1(moved).mean() >= -np.expm1(still).mean()

    # The ID-only choice takes the largest mean probability, whatever that does to the AUROC.
    choices = (0.0, 0.001, 0.005)
    held_out = sets["held out"].inputs[example.TEST_ROWS :]
    reference = Reference.from_batches(lambda: passes(model, held_out))
    chosen = Scorer.learn(detectors.create("odin", choices=choices), reference)
    means = [
        scores(Scorer(detectors.create("odin", epsilon=e), {}), model, held_out).mean()
        for e in choices
    ]
    assert float(chosen.state["step"]) == pytest.approx(choices[int(np.argmin(means))])


@pytest.mark.parametrize("seed", SEEDS)
def test_generalized_odin(sets: Mapping[str, example.Images], seed: int, figures: Figures) -> None:
    torch.manual_seed(seed)
    recipe = DeConf()
    model = recipe.build(example.Backbone(), features=128, classes=example.CLASSES)
    batches = example.Batches(sets["train"], seed)
    recipe.train(model, batches, epochs=4)
    accuracy = right(model, sets["held out"])
    scorer = Scorer(detectors.create("generalized_odin", part="h", layer="head.similarity"), {})
    inside = tapped(scorer, model, sets["ID"].inputs)
    found = {name: auroc(inside, tapped(scorer, model, sets[name].inputs)) for name in example.OODS}
    plain = aurocs(Scorer(detectors.create("msp"), {}), nn.Sequential(*classifier(seed)), sets)

    choices = (0.0, 0.0025, 0.01)
    held_out = sets["held out"].inputs[example.TEST_ROWS :]
    stepping = detectors.create("generalized_odin", layer="head.similarity", choices=choices)
    chosen = Scorer.learn(stepping, Reference.from_batches(lambda: passes(model, held_out)))
    means = [
        scores(
            Scorer(dataclasses.replace(stepping, choices=(), epsilon=e or 1e-12), {}),  # type: ignore[type-var]
            model,
            held_out,
        ).mean()
        for e in choices
    ]
    assert float(chosen.state["step"]) == pytest.approx(choices[int(np.argmin(means))])

    for name, least in (("MNIST", 0.80), ("KMNIST", 0.90), ("notMNIST", 0.88)):
        figures.hold("C2", f"generalized_odin: {name}", found[name], seed=seed, least=least)
    gain = found["MNIST"] - plain["MNIST"]
    figures.hold("C2", "generalized_odin above msp: MNIST", gain, seed=seed, least=0.10)
    figures.hold("C2", "generalized_odin: accuracy", accuracy, seed=seed, least=0.86)


def tapped(scorer: Scorer, model: DeConfModel, images: Tensor) -> np.ndarray[Any, Any]:
    """Beside the tap: one layer, no further pass."""
    (layer,) = scorer.reads().layers
    twin = Twin(model)
    parts = [twin.run(images[at : at + SLICE], (layer,)) for at in range(0, len(images), SLICE)]
    return torch.cat([scorer.score(acts) for acts in parts]).numpy()


@torch.no_grad()
def right(model: nn.Module, images: example.Images) -> float:
    found = torch.cat(
        [model(images.inputs[at : at + SLICE]) for at in range(0, len(images.inputs), SLICE)]
    ).argmax(dim=1)
    return float((found == images.labels).float().mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_ensemble(
    sets: Mapping[str, example.Images], seed: int, tmp_path: Path, figures: Figures
) -> None:
    members = [
        nn.Sequential(*example.train_classifier(sets["train"], 10 * seed + number, epochs=2)).eval()
        for number in range(5)
    ]
    model, *others = members
    for number, member in enumerate(others):
        save_file(member.state_dict(), tmp_path / f"{number}.safetensors")
    single = aurocs(Scorer(detectors.create("msp"), {}), model, sets)
    inputs = sets["held out"].inputs[:SLICE]
    reference = Reference.from_batches(lambda: passes(model, inputs))
    found = {}
    for measure in ("mutual_information", "entropy"):
        detector = detectors.create("ensemble", weights_folder=str(tmp_path), measure=measure)
        found[measure] = aurocs(Scorer.learn(detector, reference), model, sets)
    for name, least in (("MNIST", 0.82), ("KMNIST", 0.90)):
        value = found["mutual_information"][name]
        what = f"ensemble of 5, mutual information: {name}"
        figures.hold("C12", what, value, seed=seed, least=least)
    gains = {name: found["entropy"][name] - single[name] for name in example.OODS}
    what = "ensemble of 5, entropy above one member's msp"
    figures.hold("C12", f"{what}: MNIST", gains["MNIST"], seed=seed, least=0.0, expected=0.05)
    mean = sum(gains.values()) / len(gains)
    figures.hold("C12", f"{what}: mean of three sets", mean, seed=seed, least=0.05)

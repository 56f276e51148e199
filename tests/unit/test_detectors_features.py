"""Features of a layer: one pooling for all, shared per batch, and the layer that is chosen."""

from __future__ import annotations

import pytest
import torch

from oodmon.contracts import Detector, Reads
from oodmon.detectors import Reference
from oodmon.detectors.features import (
    choose,
    features,
    given_head,
    joined,
    labels_of,
    reads_of,
    unit,
)
from oodmon.detectors.states import expect
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

DRAW = torch.Generator().manual_seed(0)
MAPS = torch.randn(3, 4, 5, 2, generator=DRAW)


def test_maps_are_averaged_over_their_places_and_tokens_over_their_sequence() -> None:
    tokens = torch.randn(3, 7, 4, generator=DRAW)
    volumes = torch.randn(3, 4, 2, 3, 5, generator=DRAW)
    acts = Activations({"maps": MAPS, "tokens": tokens, "volumes": volumes})
    for name, found in (
        ("maps", MAPS.sum((2, 3)) / 10),
        ("tokens", tokens.sum(1) / 7),
        ("volumes", volumes.sum((2, 3, 4)) / 30),
    ):
        torch.testing.assert_close(features(acts, name), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_are_float32(dtype: torch.dtype) -> None:
    # in half precision the sum of these maps overflows, their mean does not
    acts = Activations({"m": torch.full((2, 1, 40, 40), 1000.0, dtype=dtype)})
    assert features(acts, "m").dtype == torch.float32
    assert features(acts, "m").tolist() == [[1000.0], [1000.0]]


def test_a_vector_is_not_copied_and_a_map_is_pooled_once() -> None:
    vector = torch.randn(3, 4, generator=DRAW)
    acts = Activations({"v": vector, "m": MAPS})
    assert features(acts, "v") is vector
    assert features(acts, "m") is features(acts, "m")
    assert joined(acts, ("v",)) is vector
    assert torch.equal(joined(acts, ("v", "m")), torch.cat([vector, features(acts, "m")], dim=1))


def test_logits_and_softmax_are_features_unless_a_layer_is_called_so() -> None:
    logits = torch.randn(3, 5, generator=DRAW)
    acts = Activations({"v": MAPS}, logits=logits)
    assert torch.equal(features(acts, "logits"), logits)
    torch.testing.assert_close(features(acts, "softmax"), logits.softmax(1))
    named = Activations({"logits": logits + 1}, logits=logits)
    assert torch.equal(features(named, "logits"), logits + 1)
    assert reads_of("logits", labels=True) == Reads(logits=True, labels=True)
    assert reads_of("a", "", "softmax") == Reads(layers=("a",), logits=True)


def test_what_is_no_layer_of_features_is_named() -> None:
    with pytest.raises(ContractError, match=r"layer 'x'.*\(3,\)"):
        features(Activations({"x": torch.zeros(3)}), "x")


def test_unit_length_whatever_the_size() -> None:
    rows = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0], [float("nan"), 1.0]])
    found = unit(Activations({"v": rows}), "v")
    torch.testing.assert_close(found[:3], torch.tensor([[0.6, 0.8]]).expand(3, 2))
    assert found[3].tolist() == [0.0, 0.0]
    assert bool(found[4].isnan().all())
    assert unit(Activations({"v": rows[:0]}), "v").shape == (0, 2)


def test_penultimate_features_come_before_the_last_layer() -> None:
    assert choose(("penultimate", "stage1", "stage2")) == "penultimate"
    assert choose(("stage1", "stage2")) == "stage2"
    assert choose(()) == ""


@pytest.mark.parametrize("name", ["duq", "rnd"])
def test_an_open_layer_becomes_the_penultimate_one(name: str) -> None:
    pinned = detectors.create(name).pin(("penultimate", "stage1"))
    assert pinned.reads().layers == ("penultimate",)
    assert detectors.create(name, layer="stage1").pin(("penultimate", "stage1")).reads().layers == (
        "stage1",
    )


def detector() -> Detector:
    return detectors.create("rnd")


def test_labels_are_given_or_predicted() -> None:
    logits = torch.eye(3)
    assert labels_of(detector(), Activations(logits=logits), "predicted").tolist() == [0, 1, 2]
    given = Activations(logits=logits, labels=torch.tensor([2, 1, 0]))
    assert labels_of(detector(), given, "true").tolist() == [2, 1, 0]
    with pytest.raises(ContractError, match=r"rnd: the reference has no labels.*predicted"):
        labels_of(detector(), Activations(logits=logits), "true")


def test_a_head_of_one_logit_has_two_sides_and_one_of_another_width_is_refused() -> None:
    weight, bias = torch.tensor([[2.0, 4.0]]), torch.tensor([6.0])
    reference = Reference.from_arrays({"v": torch.zeros(2, 2)}, head=(weight, bias))
    found = given_head(detector(), reference, 2)
    assert found is not None
    assert found[0].tolist() == [[-1.0, -2.0], [1.0, 2.0]]
    assert found[1].tolist() == [-3.0, 3.0]
    with pytest.raises(ContractError, match=r"rnd: the head's weight is \(1, 2\).*5 features"):
        given_head(detector(), reference, 5)
    assert given_head(detector(), Reference.from_arrays({"v": torch.zeros(2, 2)}), 2) is None


def test_shapes_in_letters() -> None:
    state = {"a": torch.zeros(3, 4), "b": torch.zeros(4), "c": torch.zeros(())}
    assert expect("x", state, {"a": "K D", "b": "D", "c": ""}) == {"K": 3, "D": 4}
    for wrong in (
        {"a": "D D", "b": "D", "c": ""},
        {"a": "K D", "b": "K", "c": ""},
        {"a": "K D 1", "b": "D", "c": ""},
        {"a": "K 5", "b": "D", "c": ""},
        {"a": "K D", "b": "D"},
    ):
        with pytest.raises(StateError, match="x: state"):
            expect("x", state, wrong)
    with pytest.raises(StateError, match=r"torch.float64"):
        expect("x", {"a": torch.zeros(3).double()}, {"a": "K"})

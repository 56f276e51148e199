"""`layers: auto` on small models in the shapes of the common architectures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oodmon.errors import ContractError
from oodmon.taps.layout import discover, head_of, locate
from tests.nets import VGGLike, ViTLike, build

EXPECTED = {
    "resnet": ("fc", ["layer1", "layer2", "layer3", "layer4"]),
    "vgg": ("classifier.3", ["features.2", "features.5", "features.8"]),
    "mobilenet": ("classifier.1", ["features.1", "features.3", "features.5"]),
    "vit": ("head", ["blocks.0", "blocks.2", "blocks.3", "blocks.5"]),
    "encoder": ("classifier", ["encoder"]),
    "cnn": ("fc2", ["conv1", "conv2", "fc1"]),
    "mlp": ("5", ["2", "4"]),
}


@pytest.mark.parametrize("shape", EXPECTED)
def test_head_penultimate_and_stages_are_found(shape: str) -> None:
    head, stages = EXPECTED[shape]
    layout = discover(build(shape))
    assert layout.head == head
    assert layout.classes == 5
    assert layout.names == {"penultimate": f"{head}.input"} | {
        f"stage{n}": path for n, path in enumerate(stages, start=1)
    }


def test_what_was_found_is_told_in_words() -> None:
    lines = discover(build("resnet")).lines
    assert lines[0] == "head: fc (Linear, 5 classes)"
    assert "penultimate: the input of fc" in lines
    assert "stage4: the output of layer4 (numbered stage)" in lines


def test_a_heavy_classifier_does_not_hide_the_body() -> None:
    model = VGGLike()
    model.classifier[0] = nn.Linear(64, 4096)
    model.classifier[3] = nn.Linear(4096, 5)
    assert discover(model).names["stage1"] == "features.2"


def test_heavy_linear_maps_behind_convolutions_are_not_the_trunk() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b1 = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU())
            self.b2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.ReLU())
            self.fc = nn.Sequential(nn.Flatten(), nn.Linear(512, 128), nn.ReLU())
            self.head = nn.Linear(128, 10)

    layout = discover(Small())
    assert layout.head == "head"
    assert [layout.names[f"stage{n}"] for n in (1, 2, 3)] == ["b1", "b2", "fc"]


def test_long_rows_of_blocks_are_thinned_to_quarters() -> None:
    names = discover(ViTLike(depth=12)).names
    assert [names[f"stage{n}"] for n in (1, 2, 3, 4)] == [
        "blocks.2",
        "blocks.5",
        "blocks.8",
        "blocks.11",
    ]
    assert "stage5" not in names


def test_a_backbone_in_a_wrapper_is_entered() -> None:
    class Served(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build("resnet")
            self.backbone.fc = nn.Identity()
            self.classifier = nn.Linear(32, 7)

    layout = discover(Served())
    assert layout.head == "classifier"
    assert layout.names["stage2"] == "backbone.layer2"


def test_an_auxiliary_head_is_not_the_head() -> None:
    class WithAuxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.aux_logits = nn.Linear(8, 3)
            self.fc = nn.Linear(8, 3)

    assert discover(WithAuxiliary()).head == "fc"


def test_a_pointwise_convolution_may_be_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    layout = discover(model)
    assert (layout.head, layout.classes) == ("2", 4)


def test_a_model_without_weights_has_nothing_and_says_so() -> None:
    layout = discover(nn.Sequential(nn.Flatten()))
    assert layout.names == {}
    assert layout.lines == (
        "head: none found, so no penultimate features either",
        "stages: none found",
    )


def test_the_heads_weights_come_detached() -> None:
    model = build("resnet")
    head = head_of(model)
    assert head is not None
    weight, bias = head
    assert weight.shape == (5, 32)
    assert bias.shape == (5,)
    assert not weight.requires_grad
    assert torch.equal(weight, model.state_dict()["fc.weight"])


def test_a_head_without_bias_gets_zeros() -> None:
    head = head_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False)))
    assert head is not None
    assert torch.equal(head[1], torch.zeros(3))


@pytest.mark.parametrize(
    ("spec", "path", "side"),
    [
        ("layer1", "layer1", "output"),
        ("layer1.0.conv1", "layer1.0.conv1", "output"),
        ("fc.input", "fc", "input"),
        ("fc.output", "fc", "output"),
    ],
)
def test_specs_name_a_module_and_a_side(spec: str, path: str, side: str) -> None:
    place = locate(build("resnet"), spec)
    assert (place.path, place.side) == (path, side)


def test_a_child_called_input_keeps_its_name() -> None:
    model = nn.Module()
    model.add_module("input", nn.Linear(2, 2))
    assert locate(model, "input").side == "output"


@pytest.mark.parametrize(("spec", "near"), [("layer11", "layer1"), ("fcc", "fc")])
def test_an_unknown_layer_is_named_with_near_ones(spec: str, near: str) -> None:
    with pytest.raises(ContractError) as caught:
        locate(build("resnet"), spec)
    assert repr(spec) in str(caught.value)
    assert near in str(caught.value)

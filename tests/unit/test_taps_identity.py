"""Which weights a model has: told apart where training made them, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from oodmon.taps.identity import WORDS, compare, identify
from tests.nets import SHAPES, build, images


def trained(model: nn.Module, rate: float = 1e-2, only: str = "") -> nn.Module:
    """A copy after one step, of the parameters whose names begin so."""
    model = copy.deepcopy(model)
    chosen = [p for name, p in model.named_parameters() if name.startswith(only)]
    functional.cross_entropy(model(images()), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(chosen, rate).step()
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("shape", ["resnet", "mlp", "vgg"])
def test_one_step_of_training_makes_other_weights(shape: str) -> None:
    model = build(shape)
    assert compare(identify(model), identify(trained(model))) == "values"


def test_a_head_that_was_trained_alone_makes_other_weights() -> None:
    model = build("resnet")
    assert compare(identify(model), identify(trained(model, only="fc"))) == "values"


def test_a_step_that_moves_less_than_rounding_does_is_no_other_training() -> None:
    model = build("mlp")
    near = trained(model, 1e-7)
    assert identify(near) != identify(model)
    assert compare(identify(model), identify(near)) == "rounding"


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_model_is_itself_and_no_other(shape: str) -> None:
    model = build(shape)
    own = identify(model)
    assert own.startswith("1.")
    assert identify(copy.deepcopy(model)) == own
    torch.manual_seed(1)
    assert compare(own, identify(SHAPES[shape]().eval())) == "values"


def test_weights_that_went_through_a_file_are_the_same(tmp_path: Path) -> None:
    model, other = build("resnet"), SHAPES["resnet"]()
    save_file(model.state_dict(), tmp_path / "weights")
    assert identify(other) != identify(model)
    other.load_state_dict(load_file(tmp_path / "weights"))
    assert identify(other) == identify(model)


class Served(nn.Module):
    """What a service puts around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(nn.DataParallel, id="data-parallel"),
        pytest.param(lambda m: torch.compile(m, backend="eager"), id="compiled"),
        pytest.param(Served, id="own"),
        pytest.param(lambda m: m.train(), id="train-mode"),
        pytest.param(lambda m: m.requires_grad_(requires_grad=False), id="frozen"),
        pytest.param(lambda m: m.to(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda m: m.share_memory(), id="shared-memory"),
    ],
)
def test_what_is_around_the_weights_does_not_matter(
    around: Callable[[nn.Module], nn.Module],
) -> None:
    model = build("resnet")
    own = identify(model)
    assert own
    assert identify(around(model)) == own


def test_counters_do_not_matter_and_running_statistics_do() -> None:
    model = build("resnet")
    own = identify(model)
    model.bn1.num_batches_tracked += 1  # type: ignore[union-attr, operator]
    assert identify(model) == own, "no pass in evaluation mode reads it"
    with torch.no_grad():
        model(images())
    assert identify(model) == own, "a pass in evaluation mode changes nothing"
    model.train()
    with torch.no_grad():
        before = build("resnet")(images())
        model(images())
        assert not torch.equal(before, model.eval()(images())), "its outputs are others now"
    assert compare(own, identify(model)) == "values"


def half_but_for_norms(model: nn.Module) -> nn.Module:
    model.half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


@pytest.mark.parametrize(
    "served",
    [
        pytest.param(lambda m: m.half(), id="float16"),
        pytest.param(lambda m: m.bfloat16(), id="bfloat16"),
        pytest.param(lambda m: m.double(), id="float64"),
        pytest.param(half_but_for_norms, id="mixed"),
        pytest.param(lambda m: m.bfloat16().float(), id="there-and-back"),
    ],
)
def test_another_precision_is_told_from_another_training(
    served: Callable[[nn.Module], nn.Module],
) -> None:
    model = build("resnet")
    own, other = identify(model), identify(served(copy.deepcopy(model)))
    assert own != other
    assert compare(own, other) == compare(other, own) == "rounding"
    later = trained(model)
    assert compare(own, identify(served(later))) == "values", "trained, and then rounded"


def eight_bit(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model.conv1 = nn.Module()
    model.conv1.register_buffer("weight", torch.ones(4, 3, 3, 3).to(dtype))
    return model


def fused(model: nn.Module) -> nn.Module:
    model.conv1 = torch.nn.utils.fuse_conv_bn_eval(model.conv1, model.bn1)  # type: ignore[type-var, arg-type]
    model.bn1 = nn.Identity()
    return model


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda _: SHAPES["resnet"](classes=6), id="classes"),
        pytest.param(lambda _: SHAPES["vgg"](), id="architecture"),
        pytest.param(lambda m: eight_bit(m, torch.int8), id="int8"),
        pytest.param(lambda m: eight_bit(m, torch.float8_e4m3fn), id="float8"),
        pytest.param(lambda m: m.register_buffer("mean", torch.zeros(3)) or m, id="buffer"),
        pytest.param(fused, id="fused"),
    ],
)
def test_other_parameters_are_told_from_another_training(
    changed: Callable[[nn.Module], nn.Module],
) -> None:
    model = build("resnet")
    assert compare(identify(model), identify(changed(copy.deepcopy(model)))) == "layout"


def test_tied_weights_count_once_and_order_counts() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    tied, copied = (nn.Sequential(first, copy.deepcopy(first)) for _ in range(2))
    tied[1].weight, tied[1].bias = first.weight, first.bias
    assert identify(tied) == identify(nn.Sequential(first))
    assert compare(identify(tied), identify(copied)) == "layout"
    swapped = identify(nn.Sequential(second, first))
    assert compare(identify(nn.Sequential(first, second)), swapped) == "values"


class One(nn.Module):
    """A single buffer."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", tensor)


def test_of_a_large_tensor_even_slices_with_both_ends_are_read() -> None:
    whole = torch.zeros(20_000_000)
    own = identify(One(whole))
    # 16,384 slices of 256: one begins at each 1,220th or 1,221st element
    for place, read in {0: True, 255: True, 256: False, 1220: True, 300: False, -1: True}.items():
        whole[place] = 1.0
        assert (identify(One(whole)) != own) == read, place
        whole[place] = 0.0


def test_the_cost_does_not_grow_with_the_size() -> None:
    endless = torch.ones(1).expand(1 << 40)  # four terabytes, if anything were to copy it
    assert identify(One(endless)).startswith("1.")


def test_what_cannot_be_told_is_not_told() -> None:
    assert identify(None) == ""
    assert identify(nn.ReLU()) == "", "there is nothing that training could change"
    assert identify(nn.LazyLinear(3)) == "", "no weights yet"
    assert identify(nn.Linear(3, 3, device="meta")) == "", "the weights are elsewhere"
    assert identify("a model") == ""  # type: ignore[arg-type]
    own = identify(build("mlp"))
    assert compare("", own) == compare(own, "") == ""
    assert compare(own, "2" + own[1:]) == "", "another form of another release"
    assert compare("1.abc", own) == ""
    assert set(WORDS) == {"rounding", "layout", "values"}


def test_states_of_earlier_releases_are_recognised() -> None:
    # Another text for the same weights needs another first digit.
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7)
    assert identify(model) == (
        "1.821f388837cf9943.a214abb02114c065.72c77bd6c1857647.bd6fb5862176bbbc"
    )

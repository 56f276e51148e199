"""Several thinned networks in one pass: the plain passes' answers, whatever the model does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oodmon.taps import stacks
from oodmon.taps.twin import Twin
from tests.nets import EncoderNet, build, images

SEEDS = range(40, 47)


def plain(twin: Twin, inputs: Tensor, seeds: Sequence[int] = SEEDS, rate: float = 0.0) -> Tensor:
    return torch.cat([each(twin, inputs, (seed,), rate) for seed in seeds])


def each(twin: Twin, inputs: Tensor, seeds: Sequence[int] = SEEDS, rate: float = 0.0) -> Tensor:
    found = list(twin.thinned(inputs, seeds, rate))
    assert all(acts.rows == len(inputs) for acts in found)
    return torch.stack([acts.require_logits() for acts in found])


class Counted(nn.Module):
    """Passes what it is given, and counts how often; the copy's count is the class's."""

    rows: list[int]

    def forward(self, x: Tensor) -> Tensor:
        type(self).rows.append(len(x))
        return x


def counted() -> type[Counted]:
    return type("Counts", (Counted,), {"rows": []})


def head(*inside: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 24), nn.ReLU(), *inside, nn.Linear(24, 5)
    ).eval()


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("shape", ["vgg", "mobilenet"])
def test_stacked_networks_are_the_plain_ones(shape: str, rows: int) -> None:
    twin, inputs = Twin(build(shape)), images(rows)
    torch.testing.assert_close(each(twin, inputs), plain(twin, inputs), rtol=1e-4, atol=1e-6)
    high = plain(twin, inputs, rate=0.7)
    torch.testing.assert_close(each(twin, inputs, rate=0.7), high, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(high, plain(twin, inputs))


def test_what_comes_before_the_first_dropout_is_computed_once() -> None:
    before, after = counted(), counted()
    twin = Twin(head(before(), nn.Dropout(0.5), after()))
    each(twin, images(4))
    before.rows.clear()
    after.rows.clear()
    each(twin, images(4))
    assert before.rows == [4]
    assert after.rows == [4 * len(SEEDS)]


def test_memory_is_bounded_and_the_answers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    after = counted()
    twin = Twin(head(nn.Dropout(0.5), after()))
    inputs = images(4)
    expected = plain(twin, inputs)
    for name, bound in (("_ROWS", 12), ("_BYTES", 12 * 24 * 4)):
        with monkeypatch.context() as patched:
            patched.setattr(stacks, name, bound)
            each(twin, inputs)
            after.rows.clear()
            torch.testing.assert_close(each(twin, inputs), expected)
            assert after.rows == [12, 12, 4]
            after.rows.clear()
            assert len(each(twin, images(30))) == len(SEEDS)
            assert after.rows == [30] * len(SEEDS), "more rows than the bound: one network a pass"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout2d(0.5), (3, 8, 4, 4)),
        (nn.Dropout1d(0.5), (3, 8, 16)),
        (nn.Dropout(0.5, inplace=True), (3, 128)),
        (nn.AlphaDropout(0.5), (3, 128)),
        (nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.5, inplace=True)), (3, 128)),
    ],
    ids=["2d", "1d", "in place", "alpha", "twice"],
)
def test_every_kind_of_dropout_is_stacked(layer: nn.Module, shape: tuple[int, ...]) -> None:
    after = counted()
    twin, inputs = Twin(nn.Sequential(layer, after(), nn.Flatten())), torch.rand(shape) + 1.0
    expected = plain(twin, inputs)
    assert torch.equal(each(twin, inputs), expected)
    assert torch.equal(inputs, inputs.clamp(min=1.0)), "the caller's inputs were written to"
    assert after.rows[-1] == 3 * len(SEEDS)


class Around(nn.Module):
    """A residual connection around the first dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.dropout(x.tanh(), 0.5)


class Mixing(nn.Module):
    """Takes the batch's mean away, so that networks in one batch mix."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(x, 0.5)
        return x - 0.5 * x.mean(dim=0)


class Remembers(nn.Module):
    """Knows how many rows there were before."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        return functional.dropout(x, 0.5).reshape(rows, -1, 24).mean(dim=1)


class Heads(nn.Module):
    """Drops attention weights, of whose first dimension B heads there are as many as networks."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(len(x) * len(SEEDS[:4]), 6)
        return functional.dropout(parts, 0.5).reshape(len(x), 24)


class Branches(nn.Module):
    """A second dropout meets rows that are not yet repeated; the branches meet afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5) * functional.dropout(x.cos(), 0.5)


class TimeFirst(nn.Module):
    """Rows are the second dimension, and there are as many steps as networks times rows."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.linspace(1.0, 2.0, 8)[:, None, None] * x
        steps = functional.dropout(functional.dropout(steps, 0.5), 0.25)
        return steps.sum(dim=0)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    "module", [Around, Mixing, Remembers, Heads, Branches, TimeFirst], ids=lambda m: m.__name__
)
def test_a_model_that_does_not_bear_it_is_run_plainly(module: type[nn.Module], rows: int) -> None:
    twin, inputs = Twin(head(module(), nn.Dropout(0.2))), images(rows)
    seeds = SEEDS[:4]
    expected = plain(twin, inputs, seeds)
    for _ in range(2):
        found = each(twin, inputs, seeds)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected[0], expected[1])


def test_a_transformers_networks_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    twin = Twin(EncoderNet().eval())
    for rows in (1, 4, 5):
        inputs = images(rows)
        torch.testing.assert_close(each(twin, inputs), plain(twin, inputs), rtol=1e-4, atol=1e-5)


def test_one_row_that_is_not_finite_leaves_the_others_alone() -> None:
    after = counted()
    twin, inputs = Twin(head(nn.Dropout(0.5), after())), images(4)
    inputs[0, 0, 0, 0], inputs[1, 0, 0, 0] = torch.nan, torch.inf
    found = each(twin, inputs)
    assert after.rows[-1] == 4 * len(SEEDS), "the trial was not blinded"
    assert found[:, 0].isnan().any()
    torch.testing.assert_close(found[:, 2:], plain(twin, inputs)[:, 2:])


def test_inputs_on_which_networks_agree_decide_nothing() -> None:
    """Zeros stay zeros whatever is dropped, so a trial on them would pass any model."""
    torch.manual_seed(0)
    layers = nn.Linear(768, 24, bias=False), Mixing(), nn.Linear(24, 5)
    twin = Twin(nn.Sequential(nn.Flatten(), *layers).eval())
    assert not each(twin, torch.zeros(4, 3, 16, 16)).diff(dim=0).any()
    inputs = images(4)
    torch.testing.assert_close(each(twin, inputs), plain(twin, inputs), rtol=1e-4, atol=1e-6)


def test_a_failure_after_the_trial_is_told_once_and_run_plainly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 20:
                raise RuntimeError("out of memory")
            return x

    twin, inputs = Twin(head(nn.Dropout(0.5), Small())), images(12)
    expected = plain(twin, inputs)
    for _ in range(2):
        torch.testing.assert_close(each(twin, inputs), expected)
    assert [record.message for record in caplog.records] == [
        "thinned networks cannot be stacked after all: out of memory"
    ]


def test_an_empty_batch_has_as_many_answers() -> None:
    twin = Twin(build("vgg"))
    assert each(twin, images(0)).shape == (len(SEEDS), 0, 5)


def test_a_new_layer_is_tried_anew() -> None:
    model = head(nn.Dropout(0.5), nn.Identity())
    twin, inputs = Twin(model), images(4)
    each(twin, inputs)
    model[4] = Mixing()
    model[5] = nn.Linear(24, 5).eval()
    torch.testing.assert_close(each(twin, inputs), plain(twin, inputs), rtol=1e-4, atol=1e-6)

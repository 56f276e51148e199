"""The twin: same answers, shared weights, and no way back to the model."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.taps.hooks import Hooks
from oodmon.taps.thinning import uniform
from oodmon.taps.twin import Twin
from tests.nets import SHAPES, EncoderNet, Wrapped, build, images


def thinned(twin: Twin, inputs: Tensor, seed: int, rate: float = 0.0) -> Activations:
    (found,) = twin.thinned(inputs, (seed,), rate)
    return found


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_it_answers_as_the_model_and_shares_its_weights(shape: str) -> None:
    model = build(shape)
    twin = Twin(model)
    with torch.inference_mode():
        found, expected = twin.run(images()).logits, model(images())
    assert found is not None
    torch.testing.assert_close(found, expected)
    memory = {p.data_ptr() for p in model.parameters()}
    copy = twin._copy
    assert copy is not None
    assert {p.data_ptr() for p in copy.parameters()} == memory
    assert not any(p.requires_grad for p in copy.parameters())
    buffers = {b.data_ptr() for b in model.buffers()}
    assert not buffers & {b.data_ptr() for b in copy.buffers()}


def test_weights_written_in_place_are_seen_and_moved_ones_are_copied_anew() -> None:
    model = build("mlp")
    twin = Twin(model)
    twin.run(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin.run(images()).logits, model(images()).detach())
    assert twin.builds == 1
    model.double()
    assert twin.run(images()).require_logits().dtype == torch.float64
    assert twin.builds == 2
    model[5] = nn.Linear(16, 7).double()  # type: ignore[operator]
    assert twin.run(images()).require_logits().shape == (4, 7)
    assert twin.builds == 3


def test_buffers_follow_the_model_and_never_lead_to_it() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(768, 3)
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1.0
            found: Tensor = self.head(x.flatten(1)) + self.calls
            return found

    model = Counts()
    twin = Twin(model)
    first = twin.run(images()).require_logits()
    assert torch.equal(twin.run(images()).require_logits(), first)
    assert float(model.calls.sum()) == 0.0
    model.calls.fill_(4.0)
    torch.testing.assert_close(twin.run(images()).require_logits(), first + 4.0)
    assert model.calls.tolist() == [4.0] * 3


def test_a_model_in_train_mode_and_under_hooks_is_run_without_either() -> None:
    model = build("vgg")
    expected = model(images()).detach()
    seen: list[int] = []
    model.train()
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(2))
        module.register_full_backward_hook(lambda *_: seen.append(3))
    twin = Twin(model)
    torch.testing.assert_close(twin.run(images()).logits, expected)
    twin.slope(images(), lambda acts: acts.require_logits().amax(dim=1))
    assert not seen
    assert all(module.training for module in model.modules())


def test_slopes_are_each_rows_own() -> None:
    model = build("resnet")
    twin, inputs = Twin(model), images(5)

    def largest(acts: Any) -> Tensor:
        found: Tensor = acts.require_logits().amax(dim=1)
        return found

    with torch.inference_mode():
        together = twin.slope(inputs.clone(), largest)
        alone = torch.cat([twin.slope(row, largest) for row in inputs.unsqueeze(1)])
    torch.testing.assert_close(together, alone)
    leaf = inputs.clone().requires_grad_()
    model(leaf).amax(dim=1).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(together, leaf.grad)
    assert twin.slope(inputs[:0], largest).shape == (0, 3, 16, 16)


def test_a_model_made_in_inference_mode_has_slopes_too() -> None:
    with torch.inference_mode():
        model = build("mlp")
    slope = Twin(model).slope(images(), lambda acts: acts.require_logits().amax(dim=1))
    assert bool(slope.abs().sum() > 0)


def test_layers_have_the_names_that_the_tap_gives_them() -> None:
    model = build("resnet")
    twin = Hooks().twin(model)
    acts = twin.run(images(), ("penultimate", "stage1", "layer2.0.conv1"))
    assert list(acts.layers) == ["penultimate", "stage1", "layer2.0.conv1"]
    torch.testing.assert_close(acts.layer("stage1"), _of(model, "layer1"))
    head = model.get_submodule("fc")
    torch.testing.assert_close(head(acts.layer("penultimate")), acts.require_logits())
    assert not any(module._forward_hooks for module in twin._copy.modules())  # type: ignore[union-attr]


def _of(model: nn.Module, path: str) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *a: found.append(a[2]))
    model(images())
    handle.remove()
    return found[0]


@pytest.mark.parametrize("how", ["tuple", "dict", "nested", "dataclass"])
def test_logits_are_found_as_the_tap_finds_them(how: str) -> None:
    model = Wrapped(how).eval()
    found = Hooks().twin(model).run(images()).require_logits()
    torch.testing.assert_close(found, model.net(images()))


def test_logits_of_a_layer() -> None:
    model = build("resnet")
    twin = Hooks(layers=("z=fc.input",), logits="z").twin(model)
    assert twin.run(images()).require_logits().shape == (4, 32)


def test_other_weights_take_their_place_for_one_pass() -> None:
    model, other = build("resnet"), build("resnet")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    twin = Twin(model)
    weights = {f"_orig_mod.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.testing.assert_close(twin.run(images(), weights=weights).logits, other(images()).detach())
    torch.testing.assert_close(twin.run(images()).logits, model(images()).detach())
    wrong = {**other.state_dict(), "fc.weight": torch.zeros(5, 31)}
    with pytest.raises(ContractError, match=r"'fc.weight': expected \(5, 32\), found \(5, 31\)"):
        twin.run(images(), weights=wrong)
    del wrong["fc.weight"]
    with pytest.raises(ContractError, match=r"'fc.weight' is missing"):
        twin.run(images(), weights=wrong)


@pytest.mark.parametrize("shape", ["vgg", "mobilenet"])
def test_thinned_networks_are_fixed_by_the_seed(shape: str) -> None:
    model = build(shape)
    twin, inputs = Twin(model), images(6)
    before = torch.get_rng_state()
    one = thinned(twin, inputs, 1).require_logits()
    assert torch.equal(one, thinned(twin, inputs, 1).require_logits())
    torch.testing.assert_close(one[2:4], thinned(twin, inputs[2:4], 1).require_logits())
    assert not torch.allclose(one, thinned(twin, inputs, 2).require_logits())
    assert not torch.allclose(one, thinned(twin, inputs, 1, rate=0.9).require_logits())
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(twin.run(inputs).logits, model(inputs).detach())


def test_the_share_of_units_and_their_mean_are_those_of_dropout() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.3, training=self.training)

    twin, rows = Twin(Drops()), torch.ones(2, 50_000)
    found = thinned(twin, rows, 7).require_logits()
    assert torch.equal(found[0], found[1])
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(found.max()) == pytest.approx(1 / 0.7)
    assert float(thinned(twin, rows, 7, rate=0.8).require_logits().eq(0).float().mean()) > 0.78


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout2d(0.5), (3, 8, 4, 4)),
        (nn.Dropout1d(0.5), (3, 8, 16)),
        (nn.Dropout(0.5, inplace=True), (3, 128)),
        (nn.AlphaDropout(0.5), (3, 128)),
    ],
    ids=["2d", "1d", "in place", "alpha"],
)
def test_every_kind_of_dropout_is_thinned(layer: nn.Module, shape: tuple[int, ...]) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)
            return found.flatten(1)

    inputs = torch.rand(shape) + 1.0
    found = thinned(Twin(Drops()), inputs, 3).require_logits()
    assert torch.equal(inputs, inputs.clamp(min=1.0)), "the caller's inputs were written to"
    changed = (found != inputs.flatten(1)).any(dim=0)
    assert changed.any()
    if len(shape) > 2:
        dropped = found.eq(0).reshape(3, 8, -1)
        assert torch.equal(dropped.any(dim=2), dropped.all(dim=2)), "whole channels go"
        assert 0 < int(dropped[0, :, 0].sum()) < 8


def test_sequences_that_come_first_keep_rows_alike() -> None:
    class TimeFirst(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x.transpose(0, 1), 0.5).transpose(0, 1).flatten(1)

    rows = torch.ones(4, 7, 5)
    found = thinned(Twin(TimeFirst()), rows, 1).require_logits()
    assert all(torch.equal(found[0], row) for row in found[1:])
    assert 0 < int(found[0].eq(0).sum()) < 35


def test_a_transformers_dropout_is_thinned_past_its_fused_path() -> None:
    torch.manual_seed(0)
    model = EncoderNet().eval()
    twin = Twin(model)
    assert not torch.allclose(thinned(twin, images(), 1).require_logits(), model(images()))


def test_a_model_without_dropout_cannot_be_thinned() -> None:
    with pytest.raises(ContractError, match="runs no dropout"):
        thinned(Twin(build("mlp")), images(), 1)


def test_hashed_numbers_are_uniform_and_differ_between_streams() -> None:
    device = torch.device("cpu")
    many = torch.stack(
        [uniform(seed, stream, 4096, device) for seed in (0, 1) for stream in (1, 2)]
    )
    assert bool(((many >= 0) & (many < 1)).all())
    assert many.mean(dim=1).sub(0.5).abs().max() < 0.02
    correlation = torch.corrcoef(many) - torch.eye(4)
    assert correlation.abs().max() < 0.06
    assert torch.equal(many[0, :100], uniform(0, 1, 100, device))


def test_token_ids_have_no_slope() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.EmbeddingBag(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.embed(x)
            return found

    twin, ids = Twin(Words()), torch.randint(10, (3, 6))
    assert twin.run(ids).require_logits().shape == (3, 4)
    with pytest.raises(ContractError, match=r"expected a floating tensor .* found torch.int64"):
        twin.slope(ids, lambda acts: acts.require_logits().amax(dim=1))


def test_a_twin_keeps_no_model_alive_unless_it_is_to() -> None:
    model = build("mlp")
    twin = Twin(model, keep=False)
    twin.build()
    del model
    gc.collect()
    assert twin._copy is None
    with pytest.raises(ContractError, match="the model is gone"):
        twin.run(images())
    kept = Twin(build("mlp"))
    gc.collect()
    kept.run(images())


def test_threads_take_turns() -> None:
    model = build("vgg")
    twin = Twin(model)
    expected = {n: thinned(twin, images(3, seed=n), n).require_logits() for n in range(4)}
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(10):
            if not torch.equal(thinned(twin, images(3, seed=n), n).require_logits(), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_that_shares_a_module_is_refused() -> None:
    class Sticky(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Sticky:
            return self

    with pytest.raises(ContractError, match="shares the module '1'"):
        Twin(nn.Sequential(nn.Flatten(), Sticky(768, 3))).build()


def test_a_compiled_model_is_run_uncompiled() -> None:
    model = build("mlp")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    torch.testing.assert_close(Twin(compiled).run(images()).logits, model(images()).detach())

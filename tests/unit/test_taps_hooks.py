"""The hook tap on real models: what it reads, in which modes, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from oodmon.contracts import Reads, Visit
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.taps.hooks import Hooks
from oodmon.taps.outputs import find_logits
from oodmon.taps.reader import EndHook
from tests.nets import SHAPES, ResNetLike, Wrapped, build, images, mlp


class Visited:
    observed_at = 42


class Kept:
    """An intake that keeps what it gets."""

    def __init__(self) -> None:
        self.wanted = True
        self.rows: list[int] = []
        self.acts: list[Activations] = []
        self.remarks: list[str] = []
        self.failed: list[str] = []

    def admit(self, rows: int) -> Visit | None:
        self.rows.append(rows)
        return Visited() if self.wanted else None

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        assert tap_seconds > 0
        self.acts.append(acts)
        self.remarks.append(remark)

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        self.failed.append(why)

    def room(self) -> bool:
        return True


def read(model: nn.Module, reads: Reads, *args: Any, tap: Hooks | None = None) -> Kept:
    kept = Kept()
    attached = (tap or Hooks()).attach(model, reads, kept)
    with torch.no_grad():
        model(*args)
    attached.detach()
    return kept


@pytest.mark.parametrize("shape", SHAPES)
def test_every_found_layer_can_be_read_and_outputs_stay_bit_for_bit(shape: str) -> None:
    model, plain = build(shape), build(shape)
    names = Hooks().offers(model)
    kept = Kept()
    attached = Hooks().attach(model, Reads(layers=names, logits=True), kept)
    with torch.inference_mode():
        found, expected = model(images()), plain(images())
    attached.detach()
    assert torch.equal(found, expected)
    (acts,) = kept.acts
    assert set(acts.layers) == set(names)
    assert all(len(tensor) == 4 for tensor in acts.layers.values())
    assert torch.equal(acts.require_logits(), expected)
    assert acts.observed_at == 42


def test_the_penultimate_features_are_what_the_head_maps_to_the_logits() -> None:
    model = ResNetLike().eval()
    acts = read(model, Reads(layers=("penultimate",), logits=True), images()).acts[0]
    assert torch.equal(model.fc(acts.layer("penultimate")), acts.require_logits())


@pytest.mark.parametrize("shape", ["cnn", "vgg", "mlp"])
def test_work_in_place_after_the_layer_does_not_show(shape: str) -> None:
    model = build(shape)
    path = {"cnn": "conv1", "vgg": "features.0", "mlp": "1"}[shape]
    captured: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _m, _a, out: captured.append(out.detach().clone())
    )
    acts = read(model, Reads(layers=(path,)), images()).acts[0]
    handle.remove()
    assert torch.equal(acts.layer(path), captured[0])
    assert acts.layer(path).min() < 0, "a ReLU has been here"


@pytest.mark.parametrize("how", ["tensor", "tuple", "dict", "nested", "dataclass"])
def test_logits_are_found_in_what_the_model_returns(how: str) -> None:
    model = Wrapped(how).eval()
    acts = read(model, Reads(logits=True), images()).acts[0]
    assert torch.equal(acts.require_logits(), model.net(images()))


def test_logits_of_a_named_tuple_and_of_an_object_are_found() -> None:
    class Pair(NamedTuple):
        features: Tensor
        logits: Tensor

    wanted, other = torch.zeros(4, 5), torch.ones(4, 9)
    assert find_logits(Pair(other, wanted)) is wanted
    assert find_logits(SimpleNamespace(logits=wanted)) is wanted
    assert find_logits((other, wanted), classes=5) is wanted
    assert find_logits((other, wanted)) is other
    assert find_logits(torch.zeros(4, 5, dtype=torch.int64)) is None
    assert find_logits("text") is None


def test_an_output_without_logits_is_told_not_raised() -> None:
    kept = read(nn.Conv2d(3, 4, 3), Reads(logits=True), images())
    assert kept.acts == []
    assert kept.failed == ["logits: expected a floating (B, C), found Tensor with (4, 4, 14, 14)"]


def test_a_layer_without_a_row_per_sample_is_told_not_raised() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Identity()
            self.fc = nn.Linear(768, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            self.mix(x.T)
            logits: Tensor = self.fc(x)
            return logits

    kept = read(TimeFirst(), Reads(layers=("mix", "penultimate"), logits=True), images())
    assert set(kept.acts[0].layers) == {"penultimate"}
    assert kept.remarks == ["layer 'mix': expected 4 rows, found shape (768, 4)"]


def test_inputs_and_sides_and_names_of_ones_own() -> None:
    tap = Hooks(layers=("features=fc.input", "layer2"), logits="fc")
    model = build("resnet")
    kept = read(
        model, Reads(layers=("features", "layer2"), logits=True, inputs=True), images(), tap=tap
    )
    acts = kept.acts[0]
    assert set(acts.layers) == {"features", "layer2"}
    assert torch.equal(acts.require_inputs(), images())
    assert acts.require_inputs() is not images()
    assert acts.require_logits().shape == (4, 5)
    assert tap.offers(model) == ("features", "layer2")


def test_keyword_inputs_are_read_too() -> None:
    model = build("mlp")
    kept = Kept()
    attached = Hooks().attach(model, Reads(inputs=True), kept)
    with torch.no_grad():
        model(input=images(3))
    attached.detach()
    assert kept.rows == [3]
    assert torch.equal(kept.acts[0].require_inputs(), images(3))


def test_a_pass_that_is_passed_by_is_not_read() -> None:
    model, kept = build("resnet"), Kept()
    kept.wanted = False
    attached = Hooks().attach(model, Reads(layers=("stage1",), logits=True), kept)
    model(images())
    attached.detach()
    assert kept.rows == [4]
    assert kept.acts == []


def test_two_taps_and_two_threads_on_one_model_do_not_meet() -> None:
    model, intakes = build("resnet").eval(), (Kept(), Kept())
    reads = Reads(layers=("stage1", "penultimate"), logits=True)
    taps = [Hooks().attach(model, reads, intake) for intake in intakes]
    batches = [images(seed=seed) for seed in range(40)]

    def serve(image: Tensor) -> Tensor:
        with torch.no_grad():
            return model(image)  # type: ignore[no-any-return]

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(serve, batches))
    taps[0].detach()
    serve(batches[0])
    taps[1].detach()
    assert [len(intake.acts) for intake in intakes] == [40, 41]
    for intake in intakes:
        found = {float(acts.require_logits().sum()): acts for acts in intake.acts}
        for image, answer in zip(batches, answers, strict=True):
            acts = found[float(answer.sum())]
            assert torch.equal(acts.require_logits(), answer)
            alone = read(model, reads, image).acts[0]
            for name in reads.layers:
                torch.testing.assert_close(acts.layer(name), alone.layer(name))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_shared_module_is_read_at_its_last_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.step(x)) * 1.0  # type: ignore[no-any-return]

    model = Twice()
    x = torch.randn(2, 4)
    acts = read(model, Reads(layers=("step",), logits=True), x).acts[0]
    assert torch.equal(acts.layer("step"), model.step(model.step(x)))


def test_a_model_that_calls_itself_is_read_once_per_pass() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            if depth:
                x = self(x, depth - 1)
            out: Tensor = self.step(x)
            return out

    model, kept = Recursive(), Kept()
    attached = Hooks().attach(model, Reads(layers=("step",), logits=True), kept)
    with torch.no_grad():
        model(torch.randn(2, 4))
    attached.detach()
    assert len(kept.acts) == 3
    for acts in kept.acts:
        assert torch.equal(acts.layer("step"), acts.require_logits())


def test_an_interrupted_pass_does_not_leak_into_later_ones() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, stop: bool = False) -> Tensor:
            out: Tensor = self.step(x)
            if stop:
                raise KeyboardInterrupt
            return out

    model, kept = Stops(), Kept()
    attached = Hooks().attach(model, Reads(layers=("step",), logits=True), kept)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(2, 4), stop=True)
    (end,) = (hook for hook in model._forward_hooks.values() if isinstance(hook, EndHook))
    depth, walk = 0, end._reader.local.current
    while walk is not None:
        depth, walk = depth + 1, walk.parent
    assert depth <= 4
    x = torch.randn(2, 4)
    with torch.no_grad():
        model(x)
    attached.detach()
    assert len(kept.acts) == 1
    assert torch.equal(kept.acts[0].layer("step"), model.step(x))


def test_autocast_is_read_as_it_ran() -> None:
    model = build("resnet")
    kept = Kept()
    attached = Hooks().attach(model, Reads(layers=("stage1",), logits=True), kept)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images())
    attached.detach()
    assert output.dtype == torch.bfloat16
    assert torch.equal(kept.acts[0].require_logits(), output)


def test_training_goes_on_under_the_tap() -> None:
    plain, tapped, kept = mlp(), mlp(), Kept()
    tapped.load_state_dict(plain.state_dict())
    attached = Hooks().attach(tapped, Reads(layers=("stage1",), logits=True), kept)
    for model in (plain, tapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(images(seed=step)).square().mean().backward()
            optimizer.step()
    attached.detach()
    assert len(kept.acts) == 3
    for one, other in zip(plain.parameters(), tapped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_serving_in_training_mode_is_told_once_where_it_matters() -> None:
    def remarks(model: nn.Module, passes: int = 3) -> list[str]:
        kept = Kept()
        attached = Hooks().attach(model, Reads(logits=True), kept)
        for _ in range(passes):
            model(images())
        attached.detach()
        assert len(kept.acts) == passes
        return [remark for remark in kept.remarks if remark]

    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(768, 5))
    (told,) = remarks(dropping.train())
    assert told.startswith("the model runs in training mode, in which 1 of its modules (1) answer")
    assert "call model.eval()" in told
    (told,) = remarks(build("resnet").train())
    assert re.search(r"which \d\d of its modules \(bn1, .*, …\)", told)
    assert remarks(dropping.eval()) == []
    never = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(768, 5))
    assert remarks(never.train()) == [], "nothing in it answers otherwise"
    fixed = dropping.train()
    fixed[1].eval()
    assert remarks(fixed) == []


def test_a_tapped_model_can_be_copied_and_saved_and_the_copies_are_not_tapped(
    tmp_path: Path,
) -> None:
    model, kept = build("mlp"), Kept()
    attached = Hooks().attach(model, Reads(layers=("penultimate",), logits=True), kept)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert len(kept.acts) == 1, "the copy's pass must not be read"
    file = io.BytesIO()
    torch.save(model, file)
    attached.detach()
    path = tmp_path / "model.pt"
    path.write_bytes(file.getvalue())
    script = f"""
import sys, torch
sys.modules["oodmon"] = None
model = torch.load({str(path)!r}, weights_only=False)
assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_layers_are_named_with_near_ones_and_nothing_stays_attached() -> None:
    model = build("resnet")
    with pytest.raises(ContractError, match=r"'stage9'.*near names: stage4.*penultimate, stage1"):
        Hooks().attach(model, Reads(layers=("stage1", "stage9")), Kept())
    with pytest.raises(ContractError, match=r"layer 'layer9'.*layer1"):
        Hooks(layers=("features=layer9",)).attach(model, Reads(), Kept())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_budget_must_be_a_share() -> None:
    with pytest.raises(ContractError, match="overhead_budget"):
        Hooks(overhead_budget=0.0)


def test_what_is_read_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="oodmon.taps.hooks"):
        kept = Kept()
        attached = Hooks().attach(build("resnet"), Reads(layers=("stage1",), logits=True), kept)
    assert "stage1: reads the output of layer1" in attached.found
    assert "stage1: reads the output of layer1" in caplog.messages


def test_a_hook_inside_a_fused_layer_is_warned_of() -> None:
    model = build("encoder")
    attached = Hooks().attach(model, Reads(layers=("encoder.layers.0",)), Kept())
    attached.detach()
    assert any("fused inference path" in line for line in attached.found)

"""RND: whitening, the two networks, when training stops, images and vectors."""

from __future__ import annotations

import itertools

import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.rnd import RND
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations


def features(rows: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, 10, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 3, generator=draw) @ mix + 5.0


def images(rows: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, 12)
    found = ramp * torch.rand(rows, 1, 12, 1, generator=draw)
    found[:, :, 0] = 0.0  # a border that never changes
    return found


def fitted(rows: int = 800, **options: object) -> Scorer:
    detector = RND(**options)  # type: ignore[arg-type]
    return Scorer.learn(detector, Reference.from_arrays({"f": features(rows)}))


def test_unlike_features_score_high() -> None:
    scorer = fitted(epochs=8)
    inside = scorer.score(Activations({"f": features(300, seed=1)})).numpy()
    outside = features(300, seed=2)[:, torch.arange(9, -1, -1)]
    assert auroc(inside, scorer.score(Activations({"f": outside})).numpy()) > 0.9


def test_unlike_images_score_high() -> None:
    reference = Reference.from_arrays(inputs=images(500))
    scorer = Scorer.learn(RND(on="inputs", epochs=5), reference)
    inside = scorer.score(Activations(inputs=images(100, seed=1)))
    outside = scorer.score(Activations(inputs=images(100, seed=2).flip(3)))
    assert auroc(inside.numpy(), outside.numpy()) > 0.95
    assert bool(outside.isfinite().all())


def test_the_score_is_the_mean_squared_error() -> None:
    scorer = fitted(300, epochs=2, outputs=8, width=2)
    state = {name: tensor.double() for name, tensor in scorer.state.items()}
    rows = features(5, seed=3)
    white = ((rows.double() - state["mean"]) / state["scale"]).clamp(-5, 5)
    outputs = []
    for prefix, layers in (("target", 2), ("predictor", 3)):
        found = white
        for i in range(layers):
            found = found @ state[f"{prefix}.linear{i}.weight"].T
            found = found + state[f"{prefix}.linear{i}.bias"]
            if i < layers - 1:
                found = torch.where(found > 0, found, 0.01 * found)
        outputs.append(found)
    expected = ((outputs[0] - outputs[1]) ** 2).mean(1)
    found = scorer.score(Activations({"f": rows}))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_weights_start_orthogonal_with_gain() -> None:
    target = fitted(300, epochs=1, outputs=8).state["target.linear1.weight"]
    torch.testing.assert_close(target @ target.T, 2.0 * torch.eye(8), rtol=0, atol=1e-5)


def test_whitening_is_cut_and_floored() -> None:
    scorer = Scorer.learn(RND(on="inputs", epochs=1), Reference.from_arrays(inputs=images(200)))
    assert float(scorer.state["scale"].min()) == pytest.approx(0.01, rel=0.05)
    wild = images(2)
    wild[:, :, 0] = 1e6
    edge = wild.clone()
    edge[:, :, 0] = 5e4
    assert torch.equal(
        scorer.score(Activations(inputs=wild)), scorer.score(Activations(inputs=edge))
    )


def test_training_stops_when_the_held_out_error_does_not_fall() -> None:
    said: list[str] = []
    reference = Reference.from_arrays(
        {"f": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))},
        progress=lambda _, note: said.append(note),
    )
    Scorer.learn(RND(epochs=400, learning_rate=0.1), reference)
    epochs = [note for note in said if "held-out" in note]
    assert 3 <= len(epochs) < 400


def test_training_ends_when_its_seconds_are_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A clock on which every batch takes a second; 720 rows are six batches."""
    monkeypatch.setattr("oodmon.detectors.training.monotonic", itertools.count().__next__)
    done: list[float] = []
    reference = Reference.from_arrays(
        {"f": features(800)}, progress=lambda share, _: done.append(share)
    )
    cut = Scorer.learn(RND(epochs=5, training_seconds=8.0), reference)
    assert caplog.messages == ["rnd: its training_seconds were over in epoch 2 of 5"]
    assert done == [0.2, 0.4, 1.0]
    whole = fitted(epochs=5)
    one = fitted(epochs=1)
    inside = Activations({"f": features(200, seed=1)})
    errors = [float(scorer.score(inside).mean()) for scorer in (one, cut, whole)]
    assert errors == sorted(errors, reverse=True), "what was learnt until then counts"
    assert len(caplog.messages) == 1, "600 batches take longer"


def test_only_so_many_rows_are_used() -> None:
    many = Reference.from_arrays({"f": features(3000)}, batch_size=500)
    scorer = Scorer.learn(RND(epochs=1, rows=100), many)
    again = Scorer.learn(RND(epochs=1, rows=100), many)
    assert scorer.digest == again.digest
    assert bool(scorer.score(Activations({"f": features(5)})).isfinite().all())


def test_learning_works_within_inference_mode() -> None:
    outside = fitted(200, epochs=1)
    with torch.inference_mode():
        inside = fitted(200, epochs=1)
    assert inside.digest == outside.digest
    assert not any(tensor.requires_grad for tensor in inside.state.values())


def test_large_images_are_averaged_down() -> None:
    large = images(60).repeat_interleave(4, 2).repeat_interleave(4, 3)
    scorer = Scorer.learn(RND(on="inputs", epochs=1, side=12), Reference.from_arrays(inputs=large))
    assert scorer.state["mean"].shape == (1, 12, 12)
    torch.testing.assert_close(
        scorer.score(Activations(inputs=large)),
        scorer.score(Activations(inputs=images(60))),
        rtol=1e-3,
        atol=1e-6,
    )


def test_grey_images_and_vectors_as_inputs() -> None:
    grey = images(60)[:, 0]
    scorer = Scorer.learn(RND(on="inputs", epochs=1), Reference.from_arrays(inputs=grey))
    assert scorer.state["mean"].shape == (1, 12, 12)
    flat = Scorer.learn(RND(on="inputs", epochs=1), Reference.from_arrays(inputs=features(60)))
    assert flat.state["mean"].shape == (10,)
    with pytest.raises(ContractError, match=r"images \(B, C, H, W\)"):
        Scorer.learn(RND(on="inputs"), Reference.from_arrays(inputs=torch.zeros(4, 1, 2, 3, 4)))


def test_what_does_not_fit_is_named() -> None:
    scorer = fitted(200, epochs=1)
    with pytest.raises(ContractError, match=r"rows of shape \(10,\)"):
        scorer.score(Activations({"f": torch.zeros(2, 9)}))
    with pytest.raises(StateError, match=r"target\.linear0\.bias"):
        Scorer(scorer.detector, {**scorer.state, "target.linear0.bias": torch.zeros(3)})
    with pytest.raises(StateError, match="expected 'mean'"):
        Scorer(scorer.detector, {})
    with pytest.raises(ContractError, match="layer is empty"):
        RND().learn(Reference.from_arrays({"f": features(5)}))
    for options in ({"on": "logits"}, {"outputs": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ContractError, match=next(iter(options))):
            RND(**options)

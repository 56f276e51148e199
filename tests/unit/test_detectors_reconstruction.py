"""Autoencoders: the error, the memory's addresses, the nearest codes, and what they see."""

from __future__ import annotations

import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.networks import decode, encode
from oodmon.detectors.reconstruction import VQVAE, Autoencoder, MemoryAutoencoder, address, nearest
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations


def features(rows: int, seed: int = 0) -> torch.Tensor:
    """On a plane in ten dimensions, with a little noise."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 10, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 2, generator=draw) @ mix + 0.05 * torch.randn(rows, 10, generator=draw)


def stripes(rows: int, seed: int = 0) -> torch.Tensor:
    """Upright waves of random phase, (rows, 10, 7)."""
    draw = torch.Generator().manual_seed(seed)
    phase = torch.rand(rows, 1, 1, generator=draw) * 6.28
    return (torch.sin(torch.arange(7) * 1.5 + phase) + 1).expand(rows, 10, 7).contiguous() / 2


def on_features(detector: Autoencoder) -> float:
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": features(800)}))
    inside = scorer.score(Activations({"f": features(300, seed=1)})).numpy()
    off = features(300, seed=2)[:, torch.arange(9, -1, -1)]
    return float(auroc(inside, scorer.score(Activations({"f": off})).numpy()))


def on_images(detector: Autoencoder | VQVAE) -> float:
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=stripes(400)))
    inside = scorer.score(Activations(inputs=stripes(200, seed=1))).numpy()
    lying = torch.nn.functional.interpolate(stripes(200, seed=2).mT[:, None], (10, 7))[:, 0]
    return float(auroc(inside, scorer.score(Activations(inputs=lying)).numpy()))


@pytest.mark.parametrize("kind", [Autoencoder, MemoryAutoencoder])
def test_what_lies_off_the_plane_is_not_brought_back(kind: type[Autoencoder]) -> None:
    assert on_features(kind(epochs=40, code=2, learning_rate=3e-3, width=4)) > 0.95


@pytest.mark.parametrize(
    "detector",
    [
        Autoencoder(on="inputs", epochs=15, code=4, width=4, learning_rate=3e-3),
        MemoryAutoencoder(on="inputs", epochs=15, code=4, width=4, learning_rate=3e-3),
        VQVAE(epochs=25, codes=32, depth=8, width=8, learning_rate=3e-3),
    ],
)
def test_unlike_images_are_not_brought_back(detector: Autoencoder | VQVAE) -> None:
    assert on_images(detector) > 0.95


def test_the_score_is_the_mean_squared_error_of_whitened_rows() -> None:
    detector = Autoencoder(epochs=1, code=3, width=2)
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": features(100)}))
    rows = features(5, seed=3)
    white = ((rows - scorer.state["mean"]) / scorer.state["scale"]).clamp(-5, 5)
    back = decode(encode(white, scorer.state, "encoder"), scorer.state, "decoder", (10,))
    expected = ((back - white) ** 2).mean(1)
    torch.testing.assert_close(scorer.score(Activations({"f": rows})), expected)


def test_images_are_scaled_by_channel_and_features_by_unit() -> None:
    inputs = torch.stack([stripes(60), 3.0 + 2.0 * stripes(60, seed=1)], dim=1)
    image = Scorer.learn(
        Autoencoder(on="inputs", epochs=1, width=2), Reference.from_arrays(inputs=inputs)
    ).state
    assert image["mean"].shape == (2, 10, 7)
    torch.testing.assert_close(image["mean"][:, 0, 0], inputs.mean((0, 2, 3)))
    torch.testing.assert_close(image["scale"][1].std(), torch.tensor(0.0))
    unit = Scorer.learn(Autoencoder(epochs=1), Reference.from_arrays({"f": features(60)})).state
    torch.testing.assert_close(unit["mean"], features(60).mean(0))


def test_addresses_are_sparse_and_add_to_one() -> None:
    memory = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    code = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    weight = address(code, memory, 1 / 3)
    # cosines 1, 0, -1: only the first is above a third
    torch.testing.assert_close(weight[0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(weight[1], torch.tensor([0.5, 0.5, 0.0]))
    assert torch.equal(address(code, memory, 0.99), torch.zeros(2, 3))


def test_the_nearest_code() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors, codes = torch.randn(50, 6, generator=draw), torch.randn(9, 6, generator=draw)
    assert torch.equal(nearest(vectors, codes), torch.cdist(vectors, codes).argmin(1))


def test_the_codebook_is_used_and_moves() -> None:
    reference = Reference.from_arrays(inputs=stripes(400))
    detector = VQVAE(epochs=25, codes=32, depth=8, width=8, learning_rate=3e-3)
    still = VQVAE(epochs=1, codes=32, depth=8, width=8, learning_rate=1e-9)
    moved, first = (Scorer.learn(d, reference) for d in (detector, still))
    assert not torch.allclose(moved.state["codebook.weight"], first.state["codebook.weight"])
    acts = Activations(inputs=stripes(100, seed=1))
    assert float(moved.score(acts).mean()) < 0.5 * float(first.score(acts).mean())


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ContractError, match=r"memory_autoencoder\.slots: 0 is not positive"):
        MemoryAutoencoder(slots=0)
    with pytest.raises(ContractError, match=r"images \(B, C, H, W\)"):
        Scorer.learn(VQVAE(), Reference.from_arrays(inputs=torch.zeros(5, 6)))
    detector = MemoryAutoencoder(epochs=1, slots=5, code=3)
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": features(40)}))
    with pytest.raises(StateError, match=r"'memory\.weight': expected float32 \(5, 3\)"):
        Scorer(detector, {**scorer.state, "memory.weight": torch.zeros(4, 3)})

"""SVD-RND: the three blurs, how strong they are, and that blurred images are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import fft, ndimage

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.blurs import blur_of, dct_blur, gaussian_blur, just_visible, svd_blur
from oodmon.detectors.rnd import RND
from oodmon.detectors.svd_rnd import SVDRND
from oodmon.detectors.transformations import shifted, shifts
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations


def noise(rows: int, seed: int = 0, shape: tuple[int, ...] = (2, 9, 12)) -> torch.Tensor:
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed))


def patterns(rows: int, seed: int = 0) -> torch.Tensor:
    """One of six sharp textures each, in black and white, a little disturbed."""
    draw = torch.Generator().manual_seed(seed)
    textures = (noise(6, seed=99, shape=(1, 12, 12)) > 0.5).float()
    chosen = textures[torch.randint(6, (rows,), generator=draw)]
    return chosen + 0.1 * torch.randn(rows, 1, 12, 12, generator=draw)


def test_singular_values_are_removed_from_the_rank_of_each_image() -> None:
    images = noise(3)
    blurred = svd_blur(images, 4)
    for before, after in zip(images.flatten(0, 1), blurred.flatten(0, 1), strict=True):
        left, values, right = np.linalg.svd(before.double().numpy(), full_matrices=False)
        expected = (left[:, :5] * values[:5]) @ right[:5]
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)
    thin = torch.outer(torch.rand(9), torch.rand(12)).reshape(1, 1, 9, 12)
    torch.testing.assert_close(svd_blur(thin, 4), thin)  # rank 1 keeps its one value


def test_the_cosine_blur_keeps_the_lowest_frequencies() -> None:
    images = noise(2)
    spectrum = fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho")
    spectrum[..., 3:, :] = 0.0
    spectrum[..., :, 3:] = 0.0
    expected = fft.idctn(spectrum, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(dct_blur(images, 3).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(dct_blur(images, 99), images)


@pytest.mark.parametrize("sigma", [0.5, 1.3, 6.0])
def test_the_gaussian_blur_mirrors_at_the_borders(sigma: float) -> None:
    images = noise(2)
    reach = int(np.ceil(4 * sigma))
    expected = [
        ndimage.gaussian_filter(channel.double().numpy(), sigma, mode="reflect", radius=reach)
        for channel in images.flatten(0, 1)
    ]
    found = gaussian_blur(images, sigma).flatten(0, 1)
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "dct", "svd"])
def test_the_mildest_visible_blur_is_chosen(kind: str) -> None:
    images = noise(200, shape=(1, 10, 10))
    strength = just_visible(images, kind)  # type: ignore[arg-type]
    milder = {"gaussian": strength - 0.25, "dct": strength + 1, "svd": strength - 1}[kind]
    spread = float(images.var(0, correction=0).mean())
    for tried, visible in ((strength, True), (milder, False)):
        if tried > 0:
            change = blur_of(images, kind, tried) - images  # type: ignore[arg-type]
            assert (float(change.square().mean()) >= 0.15 * spread) == visible


def test_flat_images_have_nothing_to_blur() -> None:
    with pytest.raises(ContractError, match="no detail to lose"):
        just_visible(torch.full((4, 1, 6, 6), 0.5), "svd")


@pytest.mark.parametrize("options", [{}, {"blur": "svd"}, {"blur": "dct"}])
def test_blurred_images_score_high(options: dict[str, str]) -> None:
    detector = SVDRND(epochs=12, width=4, learning_rate=3e-3, **options)  # type: ignore[arg-type]
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=patterns(600)))
    inside = scorer.score(Activations(inputs=patterns(200, seed=1))).numpy()
    blurred = gaussian_blur(patterns(200, seed=2), 1.5)
    assert auroc(inside, scorer.score(Activations(inputs=blurred)).numpy()) > 0.9


def test_turned_images_score_high_and_only_one_target_is_kept() -> None:
    detector = SVDRND(epochs=12, width=4, learning_rate=3e-3, blur="none", rotations=True)
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=patterns(600)))
    assert {name.split(".")[0] for name in scorer.state} == {
        "mean",
        "scale",
        "target",
        "predictor",
    }
    inside = scorer.score(Activations(inputs=patterns(200, seed=1))).numpy()
    turned = patterns(200, seed=2).rot90(1, (2, 3))
    assert auroc(inside, scorer.score(Activations(inputs=turned)).numpy()) > 0.9


def test_moved_images_score_far_higher_than_by_rnd() -> None:
    textures = (noise(6, seed=9, shape=(1, 8, 12)) > 0.5).float()

    def wide(rows: int, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        chosen = textures[torch.randint(6, (rows,), generator=draw)]
        return chosen + 0.1 * torch.randn(rows, 1, 8, 12, generator=draw)

    options: dict[str, Any] = {"epochs": 12, "width": 4, "learning_rate": 3e-3}
    given = Reference.from_arrays(inputs=wide(500, 0))
    plain = Scorer.learn(RND(on="inputs", **options), given)
    scorer = Scorer.learn(SVDRND(blur="none", translations=True, **options), given)
    for down, right in shifts(8, 12):
        moved = shifted(wide(200, 2), down, right)

        def ratio(one: Scorer, moved: torch.Tensor = moved) -> float:
            found = (one.score(Activations(inputs=part)).mean() for part in (moved, wide(200, 1)))
            return float(next(found) / next(found))

        assert ratio(scorer) > 2 * ratio(plain)


def test_a_moved_image_has_its_mirrored_border() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    down = shifted(image, 1, 0)[0, 0].tolist()
    assert down == [[4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    left = shifted(image, 0, -1)[0, 0, 0].tolist()
    assert left == [1, 2, 3, 2]


def test_images_that_are_not_square_are_made_square_before_they_are_turned() -> None:
    detector = SVDRND(epochs=1, width=2, rotations=True)
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=noise(40)))
    assert scorer.state["mean"].shape == (2, 9, 9)
    assert scorer.score(Activations(inputs=noise(3, seed=1))).shape == (3,)


def test_what_does_not_fit_is_named() -> None:
    for options, message in (
        ({"blur": "median"}, "'gaussian', 'dct', 'svd', 'none'"),
        ({"blur": "none"}, "use rnd"),
        ({"strength": -1.0}, "strength: -1.0 is negative"),
        ({"blur": "svd", "strength": 2.5}, "2.5 is no whole number"),
        ({"epochs": 0}, "epochs: 0 is not positive"),
    ):
        with pytest.raises(ContractError, match=message):
            SVDRND(**options)
    with pytest.raises(ContractError, match=r"images \(B, C, H, W\), found \(40, 6\)"):
        Scorer.learn(SVDRND(), Reference.from_arrays(inputs=torch.zeros(40, 6)))
    scorer = Scorer.learn(
        SVDRND(epochs=1, width=2), Reference.from_arrays(inputs=noise(40, shape=(1, 8, 8)))
    )
    with pytest.raises(ContractError, match=r"rows of shape \(1, 8, 8\), found \(1, 9, 8\)"):
        scorer.score(Activations(inputs=noise(2, shape=(1, 9, 8))))
    with pytest.raises(StateError, match="is no row that it could score"):
        Scorer(scorer.detector, {**scorer.state, "mean": torch.zeros(4)})

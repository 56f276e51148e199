"""Corruptions: what each changes and what it leaves, for images, features and tokens."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from oodmon.fitting.corruptions import corruptions_for  # noqa: E402
from oodmon.fitting.sources import Batch  # noqa: E402


def batch(inputs: Tensor, **named: Tensor) -> Batch:
    return Batch((inputs,), named, torch.arange(len(inputs)))


def images(size: tuple[int, int] = (9, 10)) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    found: Tensor = torch.rand((40, 3, *size), generator=draw) * 2 - 1
    return found


def changed(inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    given = batch(inputs)
    before = inputs.clone()
    found = {n: c(given) for n, c in corruptions_for([given], seed).items()}
    assert torch.equal(inputs, before)
    assert all(torch.equal(f.labels, given.labels) for f in found.values() if f.labels is not None)
    return {name: each.arguments[0] for name, each in found.items()}


def test_images_are_changed_and_stay_images() -> None:
    inputs = images()
    found = changed(inputs)
    assert set(found) == {"noise", "blur", "dark", "inverted", "turned", "patches"}
    for name, copies in found.items():
        assert copies.shape == inputs.shape, name
        assert copies.dtype == inputs.dtype, name
        assert not torch.allclose(copies, inputs, atol=0.05), name
        assert copies.amin() >= inputs.amin() - 1e-6, name
        assert copies.amax() <= inputs.amax() + 1e-6, name
    assert torch.equal(found["turned"], inputs.flip(2, 3))
    square = images((8, 8))
    assert torch.equal(changed(square)["turned"], square.rot90(1, (2, 3)))


def test_patches_are_the_same_pixels_in_other_places() -> None:
    inputs = images((9, 10))
    found = changed(inputs)["patches"]
    inner = (slice(None), slice(None), slice(0, 8), slice(0, 8))
    assert torch.equal(
        found[inner].flatten(2).sort(2).values, inputs[inner].flatten(2).sort(2).values
    )
    assert torch.equal(found[:, :, 8:], inputs[:, :, 8:])
    corner = found[:, :, :2, :2]
    cells = inputs[inner].unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)
    assert bool((corner[:, :, None] == cells).all(dim=(1, 3, 4)).any(dim=1).all())


def test_blur_smooths_and_dark_keeps_the_darkest() -> None:
    inputs = images()
    found = changed(inputs)
    assert found["blur"].var() < 0.7 * inputs.var()
    assert found["dark"].amin() == pytest.approx(float(inputs.amin()))
    assert found["dark"].mean() < inputs.mean()
    assert torch.allclose(
        found["inverted"].amax(dim=(0, 2, 3)), inputs.amax(dim=(0, 2, 3)), atol=1e-6
    )


def test_flat_images_have_no_blur() -> None:
    assert "blur" not in changed(torch.ones(10, 1, 8, 8))


@pytest.mark.parametrize("inputs", [images(), torch.randn(40, 6)])
def test_a_sample_that_is_not_finite_spoils_no_other_ones_copy(inputs: Tensor) -> None:
    spoilt = inputs.clone()
    spoilt[3] = math.nan
    spoilt[5].view(-1)[2] = math.inf
    whole = {name for name, copies in changed(inputs).items() if bool(copies.isfinite().all())}
    given = batch(spoilt)
    sound = batch(spoilt[6:])
    for name, change in corruptions_for([given], 0).items():
        if name in whole:
            assert bool(change(sound).arguments[0].isfinite().all()), name


def test_features_are_mixed_each_on_its_own() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn((200, 5), generator=draw) * torch.tensor([1.0, 10.0, 1.0, 1.0, 0.0]) + 3
    found = changed(inputs)
    assert set(found) == {"noise", "stretched", "mixed", "lost"}
    mixed = found["mixed"]
    assert torch.equal(mixed.sort(dim=0).values, inputs.sort(dim=0).values)
    assert int((mixed == inputs).all(dim=1).sum()) < 5
    added = (found["noise"] - inputs).std(dim=0)
    assert added[1] == pytest.approx(5.0, rel=0.2)
    assert added[4] == 0.0
    assert found["stretched"].std(dim=0)[0] == pytest.approx(
        2 * float(inputs.std(dim=0)[0]), rel=1e-4
    )
    lost = (found["lost"] != inputs)[:, :4].float().mean()
    assert lost == pytest.approx(0.25, abs=0.05)


def test_tokens_are_shuffled_or_come_from_others() -> None:
    tokens = torch.arange(120).reshape(12, 10)
    found = changed(tokens)
    assert set(found) == {"shuffled", "mixed"}
    assert torch.equal(found["shuffled"].sort(dim=1).values, tokens)
    assert not torch.equal(found["shuffled"], tokens)
    assert torch.equal(found["mixed"] % 10, tokens % 10)
    foreign = (found["mixed"] // 10 != tokens // 10).float().mean()
    assert 0.3 < float(foreign) < 0.6


def test_the_seed_decides_and_other_inputs_stay() -> None:
    first, same, other = changed(images(), 1), changed(images(), 1), changed(images(), 2)
    assert torch.equal(first["noise"], same["noise"])
    assert not torch.equal(first["noise"], other["noise"])
    mask = torch.ones(40, 3, dtype=torch.int64)
    named = Batch((), {"mask": mask, "pixels": images()}, None)
    noisy = corruptions_for([named], 0)["noise"](named)
    assert noisy.named["mask"] is mask
    assert not torch.equal(noisy.named["pixels"], named.named["pixels"])


def test_what_cannot_be_changed_has_no_corruption() -> None:
    assert corruptions_for([Batch((torch.arange(5),), {}, None)], 0) == {}
    assert corruptions_for([], 0) == {}

"""Small pictures of flagged samples, from a folder of images or an ``.npz`` file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from oodmon.errors import ContractError

__all__ = ["thumbnails"]

SIDE: Final = 96
"""Longest side of a thumbnail in pixels."""

_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def thumbnails(source: Path, sample_ids: Iterable[str]) -> Mapping[str, str]:
    """Sample id → PNG as a ``data:`` address, for the ids that the source has a picture of.

    Args:
        source: a folder with files named ``<sample id>.png`` (or .jpg, .jpeg, .webp, .bmp), or an
            ``.npz`` file with ``ids`` (N,) strings and ``images`` (N, H, W), (N, H, W, C) or
            (N, C, H, W) with C 1, 3 or 4: uint8, or floating in [0, 1] or else stretched to it.

    Errors:
        `ContractError` where the source is neither.
    """
    wanted = list(sample_ids)
    if source.is_dir():
        return _from_folder(source, wanted)
    try:
        with np.load(source, allow_pickle=False) as archive:
            ids, images = archive["ids"], archive["images"]
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(
            f"thumbnails: {source} is no folder and no .npz file with `ids` and `images`: {error}"
        ) from None
    if len(ids) != len(images) or images.ndim not in (3, 4):
        raise ContractError(
            f"thumbnails: {source}: ids {ids.shape} and images {images.shape} do not go together"
        )
    rows = {str(name): row for row, name in enumerate(ids.tolist())}
    return {name: _address(_picture(images[rows[name]])) for name in wanted if name in rows}


def _from_folder(folder: Path, wanted: Iterable[str]) -> dict[str, str]:
    found = {}
    root = folder.resolve()
    for name in wanted:
        for suffix in _SUFFIXES:
            path = root / f"{name}{suffix}"
            # A sample id is the caller's text: it may hold slashes, but must not lead elsewhere.
            if "\0" in name or not path.resolve().is_relative_to(root) or not path.is_file():
                continue
            try:
                with Image.open(path) as picture:
                    found[name] = _address(picture.convert("RGB"))
            except (UnidentifiedImageError, OSError):
                continue
            break
    return found


def _picture(array: npt.NDArray[Any]) -> Image.Image:
    """One image, whatever the order of its axes and its range."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8:
        values = np.nan_to_num(array.astype(np.float64))
        low, high = float(values.min(initial=0.0)), float(values.max(initial=1.0))
        if low < 0.0 or high > 1.0:
            values = (values - low) / max(high - low, 1e-12)
        array = np.rint(values * 255.0).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _address(picture: Image.Image) -> str:
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    # Small pictures are enlarged by whole pixels, so that what the model saw can be seen.
    how = Image.Resampling.NEAREST if scale > 1.0 else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    picture.resize((size[0], size[1]), how).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

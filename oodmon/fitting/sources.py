"""Data sets as labelled batches: arrays, an ``.npz`` file, a folder of images, torch's own.

Every source gives the same batches in the same order at each pass. Arrays, files, folders and map
data sets are shuffled once with the seed; loaders and other iterables keep their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from oodmon.detectors.outliers import OUTLIER
from oodmon.errors import ContractError
from oodmon.fitting.placed import PLACES, Places, is_places, places

__all__ = ["Batch", "Source", "from_data", "from_images", "from_npz"]

_INPUTS: Final = ("inputs", "images", "x")
_LABELS: Final = ("labels", "y")
_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm"})
_CHANNELS: Final = (1, 3, 4)
_BYTE: Final = 255.0


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model is called with, and the labels.

    Attributes:
        arguments, named: of the model's forward.
        labels: int64 (B,), or none where the data set has none.
        places: when and where each was seen, as far as that is known.
    """

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    labels: Tensor | None
    places: Places = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """B."""
        for value in (*self.arguments, *self.named.values()):
            if isinstance(value, Tensor) and value.ndim:
                return int(value.shape[0])
        return 0


@dataclass(frozen=True, slots=True)
class Source:
    """A data set.

    Attributes:
        batches: an iterator over its batches; called once per pass.
        samples: how many there are, 0 where nobody knows before the first pass.
        told: what it is, in words.
    """

    batches: Callable[[], Iterator[Batch]]
    samples: int
    told: str


def from_data(data: Any, *, batch_size: int, seed: int) -> Source:
    """What a function of the user's returned.

    Takes a pair of arrays or tensors (inputs, labels or none); a map-style `Dataset` of (input,
    label) or of inputs; a `DataLoader` or any other iterable of such batches, which must not be
    used up by one pass. An input that is a dict is given to the model by name, a tuple as several
    arguments. A third part {"times": …, "segments": …} says when and where samples were seen.
    `ContractError` says what else was found.
    """
    said: Any = {}
    if isinstance(data, (tuple, list)) and len(data) == 3 and is_places(data[2]):
        data, said = data[:2], data[2]
    if isinstance(data, (tuple, list)) and len(data) == 2 and _is_array(data[0]):
        labels = None if data[1] is None else _labels(data[1])
        return _from_arrays(_tensor(data[0]), labels, batch_size, seed, "arrays", said)
    if _is_array(data):
        return _from_arrays(_tensor(data), None, batch_size, seed, "an array", {})
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        length = len(data)  # type: ignore[arg-type]  # `Dataset` itself does not declare it
        order = _order(length, seed)
        loader: Any = DataLoader(data, batch_size=batch_size, sampler=order)
        return Source(lambda: map(_batch, loader), length, f"a data set of {length} samples")
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, Iterator):
        raise ContractError(
            "the data set is an iterator, which one pass uses up; return a list, a data set, a "
            "loader, or a pair of arrays"
        )
    if not hasattr(data, "__iter__"):
        raise ContractError(
            "expected arrays (inputs, labels), a Dataset, a DataLoader or an iterable of batches, "
            f"found {type(data).__name__}"
        )
    known: Any = getattr(data, "dataset", None)
    samples = len(known) if hasattr(known, "__len__") else 0
    return Source(lambda: map(_batch, iter(data)), samples, f"batches of a {type(data).__name__}")


def from_npz(
    path: Path, *, batch_size: int, seed: int, transform: Any = None, labelled: bool = True
) -> Source:
    """Arrays ``inputs`` (as they are) or ``images`` (see `_images`), and ``labels`` if there.

    So are ``times`` and ``segments``, which ranks within an hour or a segment need.

    The label -1 marks a known outlier; rows with one below that are left out. Nothing is
    unpickled. With `labelled` off the labels are left alone, and every row is taken.
    `ContractError` says what the file holds instead.
    """
    try:
        # numpy leaves a file that is no archive open
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            inputs = next((name for name in _INPUTS if name in file), None)
            labels = next((name for name in _LABELS if labelled and name in file), None)
            if inputs is None:
                raise ContractError(
                    f"{path}: expected an array called {' or '.join(_INPUTS)}, found "
                    f"{', '.join(file.files) or 'none'}"
                )
            array = file[inputs]
            classes = None if labels is None else file[labels]
            said = {name: file[name] for name in PLACES if name in file}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ContractError(f"{path}: not a readable .npz file: {error}") from error
    if classes is not None and len(classes) != len(array):
        raise ContractError(f"{path}: {len(array)} {inputs}, but {len(classes)} {labels}")
    if classes is not None and (np.asarray(classes) < OUTLIER).any():
        # Of an unknown class: such rows teach nothing about it.
        known_rows = classes >= OUTLIER
        said = {n: c[known_rows] if len(c) == len(array) else c for n, c in said.items()}
        array, classes = array[known_rows], classes[known_rows]
    images = inputs == "images" and transform is None
    tensor = _images(array) if images else _tensor(array)
    known = None if classes is None else _labels(classes)
    source = _from_arrays(tensor, known, batch_size, seed, str(path), said)
    return source if transform is None else _transformed(source, transform)


def from_images(
    folder: Path,
    *,
    batch_size: int,
    seed: int,
    size: tuple[int, int] | None = None,
    mode: str = "RGB",
    transform: Any = None,
    labelled: bool = True,
) -> Source:
    """A folder with one sub-folder of images per class; labels count the classes in sorted order.

    With `labelled` off the images may lie anywhere in the folder, and have no labels.

    Images become float tensors (channels, height, width) in [0, 1], resized to `size` (height,
    width) where it is given; `transform` takes the Pillow image instead. Needs Pillow.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ContractError(
            "reading an image folder needs Pillow: pip install pillow (or give an .npz file)"
        ) from None
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if labelled else ["."]
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files and not labelled:
        raise ContractError(f"{folder}: there is no image in it")
    if not files:
        raise ContractError(
            f"{folder}: expected one sub-folder of images per class, found "
            f"{len(classes)} sub-folders without images"
        )
    order = _order(len(files), seed)

    def read(path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                shaped = image.convert(mode)
                if transform is not None:
                    return torch.as_tensor(transform(shaped))
                if size is not None:
                    shaped = shaped.resize((size[1], size[0]))
                pixels = np.asarray(shaped)
        except OSError as error:
            raise ContractError(f"{path}: not a readable image: {error}") from error
        return _images(pixels[None])[0]

    def batches() -> Iterator[Batch]:
        for chosen in _chunks(order, batch_size):
            tensors = [read(files[index][0]) for index in chosen]
            shapes = {tuple(tensor.shape) for tensor in tensors}
            if len(shapes) > 1:
                raise ContractError(
                    f"{folder}: images have several sizes ({min(shapes)}, "
                    f"{max(shapes)}, …); give one with --image-size"
                )
            labels = torch.tensor([files[index][1] for index in chosen]) if labelled else None
            yield Batch((torch.stack(tensors),), {}, labels)

    of = f" of {len(classes)} classes" if labelled else ""
    return Source(batches, len(files), f"{len(files)} images{of} in {folder}")


def _from_arrays(
    inputs: Tensor,
    labels: Tensor | None,
    batch_size: int,
    seed: int,
    told: str,
    said: Mapping[str, Any],
) -> Source:
    if labels is not None and len(labels) != len(inputs):
        raise ContractError(f"{told}: {len(inputs)} inputs, but {len(labels)} labels")
    order = _order(len(inputs), seed)
    known = places(said, len(inputs), told)

    def batches() -> Iterator[Batch]:
        for chosen in _chunks(order, batch_size):
            rows = torch.tensor(chosen)
            here = {name: column[chosen] for name, column in known.items()}
            yield Batch((inputs[rows],), {}, None if labels is None else labels[rows], here)

    return Source(batches, len(inputs), f"{len(inputs)} samples of {told}")


def _transformed(source: Source, transform: Callable[[Any], Any]) -> Source:
    def batches() -> Iterator[Batch]:
        for batch in source.batches():
            rows = [torch.as_tensor(transform(row)) for row in batch.arguments[0]]
            yield Batch((torch.stack(rows),), {}, batch.labels, batch.places)

    return Source(batches, source.samples, source.told)


def _images(pixels: npt.NDArray[Any]) -> Tensor:
    """(N, H, W) or (N, H, W, C) → float32 (N, C, H, W), bytes scaled to [0, 1].

    (N, C, H, W) stays as it is; which of the two it is shows in where 1, 3 or 4 channels stand.
    """
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in _CHANNELS and pixels.shape[1] not in _CHANNELS:
        pixels = pixels.transpose(0, 3, 1, 2)
    elif pixels.ndim != 4:
        raise ContractError(f"images: expected (N, H, W) or (N, H, W, C), found {pixels.shape}")
    scale = _BYTE if pixels.dtype == np.uint8 else 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels, np.float32) / np.float32(scale))


def _batch(item: Any) -> Batch:
    """One batch of a loader: (inputs, labels), inputs alone, or a dict that may hold labels."""
    labels = None
    said: Mapping[str, Any] = {}
    inputs = item
    if isinstance(item, (tuple, list)) and len(item) == 3 and is_places(item[2]):
        inputs, labels, said = item
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, labels = item
    elif isinstance(item, (tuple, list)) and len(item) == 1:
        (inputs,) = item
    elif isinstance(item, Mapping) and "labels" in item:
        labels = item["labels"]
        inputs = {name: value for name, value in item.items() if name != "labels"}
    known = None if labels is None else _labels(labels)
    arguments: tuple[Tensor, ...] = ()
    named: dict[str, Tensor] = {}
    if isinstance(inputs, Mapping):
        named = {str(name): _tensor(value) for name, value in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        arguments = tuple(_tensor(value) for value in inputs)
    else:
        arguments = (_tensor(inputs),)
    made = Batch(arguments, named, known)
    return replace(made, places=places(said, made.rows, "a batch")) if said else made


def _labels(values: Any) -> Tensor:
    labels = _as_tensor(values, "labels")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ContractError(
            f"labels: expected whole numbers (B,), found {labels.dtype} {tuple(labels.shape)}"
        )
    return labels.long()


def _tensor(value: Any) -> Tensor:
    tensor = _as_tensor(value, "inputs")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _as_tensor(value: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = (
            f"{value.dtype} {value.shape}"
            if isinstance(value, np.ndarray)
            else type(value).__name__
        )
        raise ContractError(f"{what}: expected numbers, found {kind}") from error


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _order(length: int, seed: int) -> list[int]:
    shuffled: list[int] = np.random.default_rng(seed).permutation(length).tolist()
    return shuffled


def _chunks(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])

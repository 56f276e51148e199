"""A detector with what it learnt: the only thing that scores; saved, loaded, moved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from oodmon.contracts import Detector, Reads, State
from oodmon.contracts import Reference as ReferenceContract
from oodmon.detectors.outliers import suited
from oodmon.detectors.reference import layer_names
from oodmon.errors import ContractError, OodmonError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors
from oodmon.trust import check_unshared, write_private

__all__ = ["SCHEMA", "Scorer", "made_for"]

SCHEMA: Final = "oodmon.scorer/1"

_HEADER_BYTES: Final = 1 << 20
"""No honest header is longer; a longer one is refused before it is read."""
_TENSORS: Final = 10_000
_DIGEST_DIGITS: Final = 16


class Scorer:
    """A detector and its state. It cannot exist unfitted; it is immutable and safe to share.

    Args:
        detector: the options.
        state: what `detector.learn` returned; checked by `detector.check`.
        model, version: what it was learnt for, if known; kept in the file's header.
        weights: `taps.identity.identify` of that model, if known. It goes into the digest: a
            calibration made on other weights is another scorer's, also where nothing is learnt.
    """

    def __init__(
        self,
        detector: Detector,
        state: State,
        model: str = "",
        version: str = "",
        weights: str = "",
    ) -> None:
        devices = {tensor.device for tensor in state.values()}
        if len(devices) > 1:
            raise StateError(f"{_name(detector)}: state lies on several devices: {devices}")
        detector.check(state)
        self._fill(detector, state, (model, version, weights), _digest(detector, state, weights))

    def _fill(
        self, detector: Detector, state: State, made_for: tuple[str, str, str], digest: str
    ) -> None:
        self._detector = detector
        self._state: Mapping[str, Tensor] = MappingProxyType(dict(state))
        self._digest = digest
        self._made_for = made_for

    @classmethod
    def learn(
        cls,
        detector: Detector,
        reference: ReferenceContract,
        model: str = "",
        version: str = "",
        weights: str = "",
    ) -> Scorer:
        """Learn from in-distribution data.

        Rows with the label -1 are known outliers: only a detector that learns from such sees them.
        Layers that the detector leaves open are chosen from those of the reference. The same
        detector and reference give the same state, bit for bit.
        """
        if type(detector).pin is not Detector.pin:
            detector = detector.pin(layer_names(reference))
        learnt = detector.learn(suited(detector, reference))
        state = {name: tensor.detach().contiguous() for name, tensor in learnt.items()}
        return cls(detector, state, model, version, weights)

    @property
    def detector(self) -> Detector:
        """The options."""
        return self._detector

    @property
    def state(self) -> State:
        """What was learnt; must not be written to."""
        return self._state

    @property
    def digest(self) -> str:
        """Sixteen hex digits over name, options, state and weights; the same on every device."""
        return self._digest

    @property
    def model(self) -> str:
        """The model that it was learnt for; "" where nobody said."""
        return self._made_for[0]

    @property
    def version(self) -> str:
        """That model's version; "" where nobody said."""
        return self._made_for[1]

    @property
    def weights(self) -> str:
        """Which weights that model had, by `taps.identity.identify`; "" where nobody said."""
        return self._made_for[2]

    def reads(self) -> Reads:
        """What has to be tapped."""
        return self._detector.reads()

    def score(self, acts: Activations) -> Tensor:
        """Scores, float32 (B,), on the activations' device; nothing waits for the device.

        `ContractError` names a layer that was not tapped or a shape that does not fit.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.score(acts)
        scores = self._detector.score(acts, self._state)
        if scores.shape != (acts.rows,):
            raise ContractError(
                f"{_name(self._detector)}: expected scores ({acts.rows},), "
                f"found {tuple(scores.shape)}"
            )
        return scores if scores.dtype is torch.float32 else scores.to(torch.float32)

    def to(self, device: str | torch.device) -> Scorer:
        """The same scorer elsewhere; the digest stays."""
        moved = {name: tensor.to(device) for name, tensor in self._state.items()}
        scorer = object.__new__(Scorer)
        scorer._fill(self._detector, moved, self._made_for, self._digest)
        return scorer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all, readable by its owner only."""
        data = safetensors.torch.save(
            # copies, because safetensors refuses tensors that share memory
            {name: tensor.cpu().clone() for name, tensor in self._state.items()},
            {
                "schema": SCHEMA,
                "name": _name(self._detector),
                "options": _options(self._detector),
                "model": self.model,
                "version": self.version,
                **({"weights": self.weights} if self.weights else {}),
                "digest": self._digest,
            },
        )
        write_private(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Scorer:
        """Read what `save` wrote; `StateError` says what is wrong with the file."""
        source = Path(path)
        check_unshared(source)
        header = _header(source)
        schema = header.get("schema", "")
        if schema != SCHEMA:
            raise StateError(f"{source}: schema: expected {SCHEMA!r}, found {schema!r}")
        try:
            state: dict[str, Tensor] = safetensors.torch.load_file(source)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise StateError(f"{source}: damaged: {error}") from error
        try:
            detector = _create(header["name"], json.loads(header["options"]))
            scorer = cls(detector, state, *_made_for(header))
        except (KeyError, TypeError, ValueError, OodmonError) as error:
            raise StateError(f"{source}: {error}") from error
        if scorer.digest != header.get("digest"):
            raise StateError(
                f"{source}: digest: the header says {header.get('digest')}, "
                f"its content has {scorer.digest}; the file was changed after it was written"
            )
        return scorer if torch.device(device).type == "cpu" else scorer.to(device)

    def __repr__(self) -> str:
        return f"Scorer({self._detector!r}, digest={self._digest!r})"


def made_for(path: str | os.PathLike[str]) -> tuple[str, str, str]:
    """Model, version and weights that a file was learnt for, each "" where nobody said.

    From its header alone; `StateError` if that is damaged.
    """
    return _made_for(_header(Path(path)))


def _made_for(header: Mapping[str, str]) -> tuple[str, str, str]:
    return header.get("model", ""), header.get("version", ""), header.get("weights", "")


def _name(detector: Detector) -> str:
    return getattr(detector, "name", type(detector).__name__)


def _options(detector: Detector) -> str:
    """The options as JSON with sorted keys: the same text for the same options."""
    fields = dataclasses.fields(detector)  # type: ignore[arg-type]  # detectors are dataclasses
    return json.dumps({f.name: getattr(detector, f.name) for f in fields}, sort_keys=True)


def _create(name: str, options: Mapping[str, Any]) -> Detector:
    """From a header: JSON has lists where options are tuples."""
    return detectors.create(name, **{key: _tuple(value) for key, value in options.items()})


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value


def _digest(detector: Detector, state: State, weights: str) -> str:
    digest = hashlib.sha256(f"{_name(detector)}\0{_options(detector)}".encode())
    if weights:
        digest.update(f"\0\0{weights}".encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGEST_DIGITS]


def _header(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file, with every length checked before it is believed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise StateError(f"{path}: {size} bytes are no safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(_HEADER_BYTES, size - 8):
                raise StateError(
                    f"{path}: header: {length} bytes announced, at most "
                    f"{min(_HEADER_BYTES, size - 8)} expected"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: header is not JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > _TENSORS:
        raise StateError(f"{path}: header: expected an object of at most {_TENSORS} tensors")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StateError(f"{path}: header: `__metadata__` must map names to strings")
    return metadata

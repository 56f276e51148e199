"""Activations from files instead of from a running model: replays, tests, offline scoring.

A file holds arrays named ``layers.<name>``, ``logits``, ``inputs`` (all (B, …)), as safetensors or
as .npz. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from oodmon.contracts import Intake, Reads, Tap
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import taps

__all__ = ["Replay", "Replaying"]

_LAYER_PREFIX: Final = "layers."
_RETRY_SECONDS: Final = 0.002


@taps.register("replay")
@dataclass(frozen=True)
class Replay(Tap):
    """Reads activations from a file, in its order; the model is not run.

    Options
        path             .safetensors or .npz with ``layers.<name>``, ``logits``, ``inputs``
        batch_rows       rows handed over at once
        overhead_budget  share of serving time; nothing is served here, so 1 reads every row
    """

    path: str = ""
    batch_rows: int = 256
    overhead_budget: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ContractError(f"taps.replay.batch_rows: {self.batch_rows} is not positive")

    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Replaying:
        """Open the file; `ContractError` names what is missing in it. `play` then reads it."""
        del model
        return Replaying(self._load(reads), intake, self.batch_rows, self.path)

    def _load(self, reads: Reads) -> Activations:
        path = Path(self.path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            else:
                arrays = load_file(path)
        except (OSError, EOFError, ValueError, BadZipFile, SafetensorError) as error:
            raise ContractError(f"taps.replay.path: {path}: {error}") from error
        layers = {
            name.removeprefix(_LAYER_PREFIX): tensor
            for name, tensor in arrays.items()
            if name.startswith(_LAYER_PREFIX)
        }
        acts = Activations(layers=layers, logits=arrays.get("logits"), inputs=arrays.get("inputs"))
        for name in reads.layers:
            acts.layer(name)
        if reads.logits:
            acts.require_logits()
        if reads.inputs:
            acts.require_inputs()
        for name, tensor in arrays.items():
            if not tensor.ndim or tensor.shape[0] != acts.rows:
                raise ContractError(
                    f"{path}: {name}: expected {acts.rows} rows, found shape {tuple(tensor.shape)}"
                )
        return acts


class Replaying:
    """An opened replay. `play` hands everything to the intake, in the caller's thread."""

    def __init__(self, acts: Activations, intake: Intake, batch_rows: int, path: str) -> None:
        self._acts = acts
        self._intake = intake
        self._batch_rows = batch_rows
        self._stopped = False
        self.found = (f"replay: {acts.rows} rows from {path}",)

    def play(self, timeout_seconds: float = 60.0) -> int:
        """Hand over every row and return how many were admitted.

        Waits for room in the intake, so that nothing is shed, but never longer than the timeout in
        a row (then the oldest rows are shed and counted, as in serving).
        """
        admitted = 0
        for begin in range(0, self._acts.rows, self._batch_rows):
            give_up = time.monotonic() + timeout_seconds
            while not self._intake.room() and time.monotonic() < give_up and not self._stopped:
                time.sleep(_RETRY_SECONDS)
            if self._stopped:
                break
            rows = min(self._batch_rows, self._acts.rows - begin)
            visit = self._intake.admit(rows)
            if visit is None:
                continue
            self._intake.take(visit, self._rows(begin, rows, visit.observed_at), 0.0)
            admitted += rows
        return admitted

    def detach(self) -> None:
        """Stop a replay that runs in another thread. Safe twice."""
        self._stopped = True

    def _rows(self, begin: int, rows: int, observed_at: int) -> Activations:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin : begin + rows]

        return Activations(
            layers={n: t[begin : begin + rows] for n, t in self._acts.layers.items()},
            logits=cut(self._acts.logits),
            inputs=cut(self._acts.inputs),
            observed_at=observed_at,
        )

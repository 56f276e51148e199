"""Several thinned networks in one pass, where the model bears it: what they share is computed once.

From the first dropout on a pass has K·B rows (`thinning`). A model may be written so that this goes
wrong: a residual connection around the first dropout, a mean over the batch, a batch size that it
remembers. So each kind of input is tried on two rows beside the plain passes, and where the answers
differ by more than rounding, or cannot be compared, the plain passes are what is run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from oodmon.taps.thinning import Thinning

__all__ = ["Stacks"]

_LOG = logging.getLogger(__name__)

_ROWS: Final = 1024
_BYTES: Final = 1 << 22
"""Rows behind the first dropout, and bytes of what it gives, at most: this bounds the memory."""

_TRIAL_ROWS: Final = 2
_TRIAL_NETWORKS: Final = 4

_ROUNDING: Final = 0.01
"""What stacked answers may differ from plain ones by, as a share of what the networks do."""

Pass = Callable[[Tensor, Thinning], Tensor]
"""Logits of a pass of these inputs with dropout as `Thinning` has it."""


class Stacks:
    """Knows which inputs may be stacked, and how many networks deep; `run` makes a pass."""

    def __init__(self, run: Pass) -> None:
        self._run = run
        self._widths: dict[tuple[Any, ...], int] = {}

    def answers(self, inputs: Tensor, seeds: Sequence[int], rate: float) -> Sequence[Tensor]:
        """Logits (B, C) of as many of the first networks as one pass may hold.

        None, where each needs a pass of its own. The first call for a kind of input runs the trial,
        and waits for it.
        """
        if len(seeds) < 2 or not len(inputs) or inputs.is_meta:  # nothing to try it on
            return ()
        kind = (inputs.shape[1:], inputs.dtype, inputs.device, rate)
        if kind not in self._widths:
            width = self._tried(inputs, seeds[:_TRIAL_NETWORKS], rate)
            if width is None:
                return ()
            self._widths[kind] = width
        width = self._widths[kind]
        deep = min(_ROWS, _BYTES // width) // len(inputs) if width else 0
        if deep < 2:
            return ()
        try:
            return self._stacked(inputs, seeds[:deep], rate)
        except Exception as error:
            _LOG.warning("thinned networks cannot be stacked after all: %s", error)
            self._widths[kind] = 0
            return ()

    def _stacked(self, inputs: Tensor, seeds: Sequence[int], rate: float) -> Sequence[Tensor]:
        found = self._run(inputs, Thinning(seeds, rate, len(inputs)))
        return found.chunk(len(seeds))

    def _tried(self, inputs: Tensor, seeds: Sequence[int], rate: float) -> int | None:
        """Bytes of a row at the first dropout, 0 where stacking goes wrong, none if undecided."""
        rows = inputs[:_TRIAL_ROWS]
        rows = torch.where(rows.isfinite(), rows, torch.zeros_like(rows))
        rows = rows.expand(_TRIAL_ROWS, *rows.shape[1:]).contiguous()
        width, plain = 0, []
        for seed in seeds:
            thinning = Thinning((seed,), rate, len(rows))
            plain.append(self._run(rows, thinning))
            width = thinning.width
        expected = torch.stack(plain)
        spread = (expected - expected[0]).abs().amax()
        if not bool(spread > 0.0):  # not finite, or no unit that was dropped makes a difference
            return None
        try:
            found = torch.stack([*self._stacked(rows, seeds, rate)])
        except Exception as error:
            _LOG.debug("thinned networks are not stacked: %s", error)
            return 0
        alike = (found - expected).abs().amax() <= _ROUNDING * spread
        return width if bool(alike) else 0

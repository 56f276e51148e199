"""Training as all recipes here do it: SGD with momentum whose rate falls in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from oodmon.errors import ContractError

__all__ = ["SizedBatches", "descend"]

_MOMENTUM: Final = 0.9


class SizedBatches(Protocol):
    """Inputs and labels (B,), a known number of batches, again at each pass: a `DataLoader`."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass."""

    def __len__(self) -> int:
        """Batches in a pass."""


def descend(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    batches: SizedBatches,
    epochs: int,
    *,
    name: str,
    rate: float,
    weight_decay: float,
    decay: float,
    decay_at: Sequence[float],
    loss: Callable[[Tensor, Tensor], Tensor],
    after_step: Callable[[Tensor, Tensor], None] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> None:
    """Train in place; leaves the model in eval mode.

    Args:
        model: in train mode meanwhile.
        groups: of parameters, as torch's optimisers take them.
        batches, epochs: `ContractError` where they come to no step.
        name: of the recipe, for messages.
        rate, weight_decay: of SGD; a group may have its own.
        decay, decay_at: the rate is multiplied by the one after these shares of the steps.
        loss: of inputs and labels, a scalar.
        after_step: what else moves, given inputs and labels.
        progress: told the share that is done.
    """
    steps = epochs * len(batches)
    if steps < 1:
        raise ContractError(f"{name}.train: no batches")
    sgd = torch.optim.SGD(groups, lr=rate, momentum=_MOMENTUM, weight_decay=weight_decay)
    falls = {int(share * steps) for share in decay_at}
    step = 0
    model.train()
    for _ in range(epochs):
        for inputs, labels in batches:
            if step in falls:
                for group in sgd.param_groups:
                    group["lr"] *= decay
            sgd.zero_grad()
            loss(inputs, labels).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            sgd.step()
            if after_step is not None:
                after_step(inputs, labels)
            step += 1
            if progress is not None:
                progress(step / steps, f"{name.lower()}: training")
    model.eval()

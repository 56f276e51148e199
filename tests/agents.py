"""A feed that remembers and scorers of a few lines, for tests of the agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oodmon.agent import Agent, Limits
from oodmon.contracts import Feed, Reader, Reads, Writer
from oodmon.records import Activations, ScoreBatch
from oodmon.taps.hooks import Hooks
from tests.waiting import PATIENCE_SECONDS

QUICK = Limits(queue_passes=1000, linger_seconds=0.0, retry_seconds=0.05)
"""No waiting for more passes and none shed, so that tests see each batch at once."""


@dataclass
class Recorded(Writer):
    """A writer whose `put` can be told to refuse or to raise."""

    source: str
    batches: list[ScoreBatch] = field(default_factory=list)
    behave: Callable[[], bool] = lambda: True
    closed: int = 0

    def put(self, batch: ScoreBatch) -> bool:
        if not self.behave():
            return False
        self.batches.append(batch)
        return True

    def close(self) -> None:
        self.closed += 1


@dataclass
class Recording(Feed):
    """Keeps one writer per source."""

    behave: Callable[[], bool] = lambda: True
    writers: list[Recorded] = field(default_factory=list)

    def writer(self, source: str) -> Writer:
        self.writers.append(Recorded(source, behave=self.behave))
        return self.writers[-1]

    def reader(self) -> Reader:
        raise NotImplementedError

    @property
    def batches(self) -> list[ScoreBatch]:
        return [batch for writer in self.writers for batch in writer.batches]

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)


@dataclass
class Norm:
    """Scores by the norm of the penultimate features; `before` runs first and may raise."""

    layers: tuple[str, ...] = ("penultimate",)
    before: Callable[[Activations], Any] = lambda _acts: None
    digest: str = "00112233aabbccdd"
    device: torch.device | str = "cpu"

    def reads(self) -> Reads:
        return Reads(layers=self.layers)

    def score(self, acts: Activations) -> Tensor:
        self.before(acts)
        return acts.layer(self.layers[0]).float().flatten(1).square().sum(dim=1)

    def to(self, device: torch.device | str) -> Norm:
        return Norm(self.layers, self.before, self.digest, device)


class Patient(Agent):
    """Waits at its end for all that is left, however slow the machine is."""

    def detach(self, timeout_seconds: float = PATIENCE_SECONDS) -> bool:
        return super().detach(timeout_seconds)


def attach(
    model: nn.Module,
    feed: Feed,
    scorers: Mapping[str, Norm] | None = None,
    limits: Limits = QUICK,
    budget: float = 1.0,
    **options: Any,
) -> Agent:
    """An agent that reads every pass, unless told otherwise."""
    return Patient.attach(
        model,
        tap=options.pop("tap", Hooks()),
        scorers=scorers or {"norm": Norm()},
        feed=feed,
        model_name="net",
        version="1",
        overhead_budget=budget,
        limits=limits,
        **options,
    )

"""Labels that come late, beside the loop: joined and judged each round, read from their topic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oodmon.daemon.couriers import Couriers
from oodmon.daemon.label_topic import LabelIntake
from oodmon.daemon.labels import tell
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.observe import Observer
from oodmon.daemon.parts import Parts
from oodmon.daemon.truth import STEPS, Truth
from oodmon.labelling import LABELS
from oodmon.records import Event, Fact
from oodmon.store.events import Store
from oodmon.store.outcomes import Outcome

__all__ = ["Late"]


class Late:
    """What upkeep does with labels; all of it in transactions of its own.

    Args:
        store: open while it is called.
        metrics, observer: where it is told.
        couriers: woken for what was put into the outbox.
        parts: what the configuration makes at present.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        observer: Observer,
        couriers: Couriers,
        parts: Callable[[], Parts],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._observer = observer
        self._couriers = couriers
        self._parts = parts

        self._topic: LabelIntake | None = None

    def start(self) -> None:
        """Read the topic of labels from now on, where there is one."""
        parts = self._parts()
        if parts.label_topic is None:
            return
        pipeline = parts.pipeline
        self._topic = LabelIntake(
            parts.label_topic,
            self._store,
            self._metrics,
            pipeline.model,
            pipeline.version,
            lambda: self._parts().routes,
            self._couriers.wake,
        )
        self._topic.start()

    def stop(self) -> None:
        """Read it no more. Safe twice, safe without `start`."""
        if self._topic is not None:
            self._topic.stop()

    def states(self) -> dict[str, str]:
        """What is shown beside what has to work: ``labels`` → "ok", or what is wrong with it."""
        return {} if self._topic is None else {"labels": self._topic.state}

    def round(self) -> None:
        """Join what came, conclude what it shows of the loss, and tell what all of it comes to."""
        parts = self._parts()
        if parts.labelling is None:
            return
        newest = self._store.newest_ns()
        if parts.truth is None:
            self._store.join_labels(newest)
        else:
            self._judge(parts, parts.truth, newest)
        judge = next(
            (one for one in parts.pipeline.calibrations.values() if one.is_set_right), None
        )
        tell(parts.labelling, self._store, self._metrics, newest, judge)

    def _judge(self, parts: Parts, truth: Truth, newest: int) -> None:
        made: list[Fact] = []

        def judge(
            state: str, outcomes: Sequence[Outcome]
        ) -> tuple[str, Sequence[Fact], Sequence[tuple[str, Event]]]:
            after, facts = truth.judge(state, outcomes)
            made.extend(facts)
            return after, facts, [pair for fact in facts for pair in parts.routes(fact)]

        self._metrics.put("oodmon_promise_info", 1, test=LABELS, promise=truth.promise)
        self._store.judge_labels(newest, truth.model, truth.version, judge, STEPS)
        self._observer.facts(made)
        self._couriers.wake({receiver for fact in made for receiver, _ in parts.routes(fact)})

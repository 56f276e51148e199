"""Labels that come late: predictions by sample id, an inbox for labels, and what they come to.

Anybody may INSERT into `labels`. `Labels.join` moves what is there into the predictions of the same
sample, where it stays as long as these do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    bindparam,
    case,
    cast,
    delete,
    func,
    select,
    update,
)

from oodmon.store import tables
from oodmon.store.database import Database
from oodmon.store.rows import Row, key
from oodmon.store.statements import insert_new, insert_or_change

__all__ = ["Labels", "Measured", "Prediction"]

_AT_ONCE: Final = 5_000
"""Labels joined in one transaction: the daemon's commits wait no longer than for these."""
_SURE: Final = 1.96
"""Standard errors either side of a 95 % interval."""
_MOST: Final = 200_000
"""Labelled samples that an estimate is set right by, at most."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was answered for one sample; `expected_error` is NaN where nothing estimates it."""

    sample_id: str
    model: str
    version: str
    segment: str
    observed_at: int
    predicted: int
    expected_error: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What the labels of a span say.

    Attributes:
        model, version: what was served.
        samples: predictions that were kept.
        labelled: of these, with a label.
        accuracy: share of right answers among the labelled; NaN without any.
        low, high: 95 % interval of it (Wilson 1927).
        estimated: accuracy as estimated without labels, of all samples; NaN where it was not.
        shift: by how much the labels show the estimate to be too low, over labelled samples that
            have one; NaN where there are none.
        corrected: `estimated` + `shift`, in [0, 1]: the estimate on all, set right by the labels on
            some (prediction-powered inference, Angelopoulos et al., Science 2023). NaN without one.
        error: half of the 95 % interval of `corrected`.
    """

    model: str
    version: str
    samples: int
    labelled: int
    accuracy: float
    low: float
    high: float
    estimated: float
    shift: float
    corrected: float
    error: float


class Labels:
    """Predictions and labels of one pipeline; `Store` documents the calls."""

    def __init__(self, database: Database, pipeline: str) -> None:
        self._database = database
        self._pipeline = pipeline

    def keep(self, connection: Connection, predictions: Sequence[Prediction]) -> None:
        """Write predictions, in the transaction of the facts; the first of a sample stays."""
        if predictions:
            rows = [self._row(prediction) for prediction in predictions]
            connection.execute(insert_new(tables.predictions, self._database.dialect), rows)

    def _row(self, kept: Prediction) -> Row:
        return {
            "pipeline": self._pipeline,
            "sample_id": key(kept.sample_id),
            "model": key(kept.model),
            "version": key(kept.version),
            "segment": key(kept.segment),
            "observed_at_ns": kept.observed_at,
            "predicted": kept.predicted,
            "expected_error": None if math.isnan(kept.expected_error) else kept.expected_error,
            "label": None,
        }

    def add(self, labels: Mapping[str, int]) -> None:
        """Put labels into the inbox; a newer one replaces one that waits there."""
        if labels:
            with self._database.write() as connection:
                self.put(connection, labels)

    def put(self, connection: Connection, labels: Mapping[str, int]) -> None:
        """The same, in the caller's transaction."""
        if not labels:
            return
        statement = insert_or_change(
            tables.labels, self._database.dialect, lambda new: {"label": new.label, "seen_ns": 0}
        )
        rows = [
            {"pipeline": self._pipeline, "sample_id": key(name), "label": label, "seen_ns": 0}
            for name, label in labels.items()
        ]
        connection.execute(statement, rows)

    def join(
        self,
        now_ns: int,
        conclude: Callable[[Connection, Sequence[Row]], None] | None = None,
        most: int = 0,
    ) -> int:
        """Move labels to their predictions; how many found one. The others wait, seen at `now_ns`.

        A sample that several model versions answered has its label in each.

        Args:
            now_ns: as above.
            conclude: called in each transaction, before they are moved, with the `name` and `value`
                of labels that found a prediction.
            most: transactions; 0 is no limit.
        """
        inbox, kept = tables.labels, tables.predictions
        mine = inbox.c.pipeline == self._pipeline
        known = (
            select(kept.c.sample_id)
            .where(kept.c.pipeline == inbox.c.pipeline, kept.c.sample_id == inbox.c.sample_id)
            .exists()
        )
        some = select(inbox.c.sample_id, inbox.c.label).where(mine, known).limit(_AT_ONCE)
        named = (
            update(kept)
            .where(kept.c.pipeline == self._pipeline, kept.c.sample_id == bindparam("name"))
            .values(label=bindparam("value"))
        )
        done = (
            delete(inbox)
            .where(mine, inbox.c.sample_id == bindparam("name"))
            # Not one that was corrected meanwhile.
            .where(inbox.c.label == bindparam("value"))
        )
        joined = 0
        for turn in itertools.count(1):
            with self._database.write() as connection:
                found = [
                    {"name": row.sample_id, "value": row.label} for row in connection.execute(some)
                ]
                if found and conclude is not None:
                    conclude(connection, found)
                if found:
                    connection.execute(named, found)
                    connection.execute(done, found)
                joined += len(found)
                if len(found) < _AT_ONCE:
                    unseen = update(inbox).where(mine, inbox.c.seen_ns == 0)
                    connection.execute(unseen.values(seen_ns=max(now_ns, 1)))
                if len(found) < _AT_ONCE or turn == most:
                    break
        return joined

    def judged(self, model: str, version: str, since_ns: int) -> list[tuple[float, bool]]:
        """Expected errors of labelled samples observed since then, and whether they were wrong.

        Of the newest `_MOST`, in the order in which they were observed.
        """
        kept = tables.predictions
        query = (
            select(kept.c.expected_error, kept.c.label != kept.c.predicted)
            .where(
                kept.c.pipeline == self._pipeline,
                kept.c.model == key(model),
                kept.c.version == key(version),
                kept.c.observed_at_ns >= since_ns,
                kept.c.label.is_not(None),
                kept.c.expected_error.is_not(None),
            )
            .order_by(kept.c.observed_at_ns.desc(), kept.c.sample_id)
            .limit(_MOST)
        )
        with self._database.read() as connection:
            rows = [(float(error), bool(wrong)) for error, wrong in connection.execute(query)]
        return rows[::-1]

    def measured(self, since_ns: int, until_ns: int) -> list[Measured]:
        """Per model version what the samples observed in [since, until) come to."""
        kept = tables.predictions
        labelled = kept.c.label.is_not(None)
        right = case((kept.c.label == kept.c.predicted, 1.0), else_=0.0)
        estimate = 1.0 - kept.c.expected_error
        both = labelled & kept.c.expected_error.is_not(None)
        shift = right - estimate

        def over(where: ColumnElement[bool], value: Any) -> ColumnElement[float]:
            return func.coalesce(func.sum(case((where, cast(value, Float)), else_=0.0)), 0.0)

        query = (
            select(
                kept.c.model,
                kept.c.version,
                func.count().label("samples"),
                over(labelled, 1.0).label("labelled"),
                over(labelled, right).label("right"),
                func.count(kept.c.expected_error).label("estimated"),
                func.coalesce(func.sum(estimate), 0.0).label("estimate"),
                func.coalesce(func.sum(estimate * estimate), 0.0).label("estimate_2"),
                over(both, 1.0).label("both"),
                over(both, shift).label("shift"),
                over(both, shift * shift).label("shift_2"),
            )
            .where(
                kept.c.pipeline == self._pipeline,
                kept.c.observed_at_ns >= since_ns,
                kept.c.observed_at_ns < until_ns,
            )
            .group_by(kept.c.model, kept.c.version)
            .order_by(kept.c.model, kept.c.version)
        )
        with self._database.read() as connection:
            return [_measured(row._asdict()) for row in connection.execute(query)]


def _measured(row: Row) -> Measured:
    n = int(row["labelled"])
    accuracy, low, high = math.nan, 0.0, 1.0
    if n:
        accuracy = row["right"] / n
        low, high = _wilson(accuracy, n)
    estimated, shift, corrected, error = math.nan, math.nan, math.nan, math.nan
    if row["estimated"]:
        estimated, spread = _moments(row["estimate"], row["estimate_2"], row["estimated"])
        if row["both"]:
            shift, spread_of_shift = _moments(row["shift"], row["shift_2"], row["both"])
            corrected = min(max(estimated + shift, 0.0), 1.0)
            error = _SURE * math.sqrt(spread / row["estimated"] + spread_of_shift / row["both"])
    return Measured(
        row["model"],
        row["version"],
        row["samples"],
        n,
        accuracy,
        low,
        high,
        estimated,
        shift,
        corrected,
        error,
    )


def _moments(total: float, squares: float, count: float) -> tuple[float, float]:
    mean = total / count
    return mean, max(squares / count - mean * mean, 0.0)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval: it is one even where all or none are right."""
    z2 = _SURE * _SURE / n
    centre = (share + z2 / 2.0) / (1.0 + z2)
    half = _SURE / (1.0 + z2) * math.sqrt(share * (1.0 - share) / n + z2 / (4.0 * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)

"""The tables that a person can query, as SQLAlchemy Core metadata; `docs/store.md` explains them.

Times are int nanoseconds since the epoch, UTC, in columns that end in ``_ns``. Every such table
has a view ``<table>_view`` with the same columns and readable timestamps beside them.

The keys of facts are natural ones, so that the same fact on replay is the same row. No column of
`windows`, `drift_results`, `alerts`, `flagged_samples` and `notices` holds a wall-clock time or a
running number: two runs over the same input write the same rows.

Every table is keyed by `pipeline` first, so that several daemons can share one database.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "TIME_OF",
    "agents",
    "alerts",
    "drift_results",
    "flagged_samples",
    "label_evidence",
    "labels",
    "leases",
    "metadata",
    "notices",
    "outbox",
    "pipeline_state",
    "positions",
    "predictions",
    "trigger_firings",
    "windows",
]

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the column is called INTEGER.
_RowNumber = BigInteger().with_variant(Integer(), "sqlite")


def _key(name: str) -> Column[str]:
    return Column(name, Text, primary_key=True, nullable=False)


def _key_ns(name: str) -> Column[int]:
    return Column(name, BigInteger, primary_key=True, nullable=False, autoincrement=False)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


def _number(name: str) -> Column[float]:
    """NULL where there is no finite-or-infinite value to tell (NaN)."""
    return Column(name, Double, nullable=True)


windows: Final = Table(
    "windows",
    metadata,
    _key("pipeline"),
    _key("model"),
    _key("version"),
    _key("segment"),
    _key("detector"),
    _key_ns("window_start_ns"),
    _key_ns("window_end_ns"),
    _count("samples"),
    _count("scored"),
    _count("invalid"),
    _count("dropped"),
    _count("late"),
    _count("pairs"),
    _count("jumps"),
    _count("swings"),
    _count("judged"),
    _count("errors"),
    _number("share_p05"),
    _number("share_p01"),
    _number("mean_p"),
    _number("estimated_accuracy"),
    _text("counts"),
    _text("predicted"),
    _text("raw"),
    Index(None, "pipeline", "window_start_ns"),
)

drift_results: Final = Table(
    "drift_results",
    metadata,
    _key("pipeline"),
    _key("model"),
    _key("version"),
    _key("test"),
    _key("segment"),
    _key("detector"),
    _key_ns("window_start_ns"),
    _key_ns("window_end_ns"),
    Column("drifted", Boolean, nullable=False),
    _number("statistic"),
    _number("threshold"),
    _number("effect"),
    _number("p_value"),
    _count("samples"),
    _count("reference_samples"),
    _count("changed_since_ns"),
    Index(None, "pipeline", "window_start_ns"),
)

alerts: Final = Table(
    "alerts",
    metadata,
    _key("pipeline"),
    _key("fingerprint"),
    _key_ns("started_at_ns"),
    _count("ended_at_ns"),
    _text("status"),
    _text("rule"),
    _text("severity"),
    _text("model"),
    _text("version"),
    _text("test"),
    _text("segment"),
    _text("detector"),
    _text("labels"),
    _text("evidence"),
    _text("resolution"),
    Index(None, "pipeline", "started_at_ns"),
)

flagged_samples: Final = Table(
    "flagged_samples",
    metadata,
    _key("pipeline"),
    _key("model"),
    _key("version"),
    _key("detector"),
    _key("sample_id"),
    _key_ns("observed_at_ns"),
    _key_ns("occurrence"),
    _text("segment"),
    _number("score"),
    _number("p"),
    Index(None, "pipeline", "observed_at_ns"),
)

notices: Final = Table(
    "notices",
    metadata,
    _key("pipeline"),
    _key("model"),
    _key("version"),
    _key("source"),
    _key("key"),
    _count("observed_at_ns"),
    _text("text"),
    Index(None, "pipeline", "observed_at_ns"),
)

predictions: Final = Table(
    "predictions",
    metadata,
    _key("pipeline"),
    _key("sample_id"),
    _key("model"),
    _key("version"),
    _text("segment"),
    _count("observed_at_ns"),
    _count("predicted"),
    _number("expected_error"),
    Column("label", BigInteger, nullable=True),
    Index(None, "pipeline", "observed_at_ns"),
)

labels: Final = Table(
    "labels",
    metadata,
    _key("pipeline"),
    _key("sample_id"),
    _count("label"),
    Column("seen_ns", BigInteger, nullable=False, server_default="0"),
)

label_evidence: Final = Table(
    "label_evidence",
    metadata,
    _key("pipeline"),
    _key("model"),
    _key("version"),
    _text("state"),
)

agents: Final = Table(
    "agents",
    metadata,
    _key("pipeline"),
    _key("source"),
    _text("model"),
    _text("version"),
    _count("sequence"),
    _count("observed_at_ns"),
    _count("samples"),
    _count("dropped"),
    _count("lost"),
    Column("sampled_fraction", Double, nullable=False),
)

positions: Final = Table(
    "positions",
    metadata,
    _key("pipeline"),
    _key("partition"),
    _text("position"),
)

outbox: Final = Table(
    "outbox",
    metadata,
    Column("seq", _RowNumber, primary_key=True, nullable=False),
    _text("pipeline"),
    _text("receiver"),
    _text("event_id"),
    _text("type"),
    _text("source"),
    _text("subject"),
    _count("time_ns"),
    _text("data"),
    _text("status"),
    _count("attempts"),
    _count("not_before_ns"),
    _text("error"),
    _count("first_failed_ns"),
    _count("last_failed_ns"),
    UniqueConstraint("pipeline", "receiver", "event_id"),
    Index(None, "pipeline", "receiver", "status", "seq"),
    # A number that was pruned must not be given out again.
    sqlite_autoincrement=True,
)

pipeline_state: Final = Table(
    "pipeline_state",
    metadata,
    _key("pipeline"),
    _text("digest"),
    _count("revision"),
    _text("writer"),
    Column("state", LargeBinary, nullable=False),
)

leases: Final = Table(
    "leases",
    metadata,
    _key("pipeline"),
    _text("holder"),
    _text("host"),
    _text("place"),
    _count("pid"),
    _count("started"),
    _count("epoch"),
    _count("beats"),
    _count("expires_at_ns"),
)

trigger_firings: Final = Table(
    "trigger_firings",
    metadata,
    _key("pipeline"),
    _key("trigger_id"),
    _key("request_id"),
    _count("at_ns"),
    _text("outcome"),
    Index(None, "pipeline", "trigger_id", "at_ns"),
)

TIME_OF: Final = {
    windows: windows.c.window_start_ns,
    drift_results: drift_results.c.window_start_ns,
    alerts: alerts.c.started_at_ns,
    flagged_samples: flagged_samples.c.observed_at_ns,
    notices: notices.c.observed_at_ns,
    trigger_firings: trigger_firings.c.at_ns,
    predictions: predictions.c.observed_at_ns,
    labels: labels.c.seen_ns,
}
"""The column that ``since_ns <= … < until_ns`` of a query speaks of."""

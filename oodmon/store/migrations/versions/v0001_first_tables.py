"""The first tables: facts, outbox, pipeline state, positions, trigger firings.

A revision is history: it repeats what `tables.py` said when it was written and never imports it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_COUNTS = {
    "windows": (
        *("samples", "scored", "invalid", "dropped", "late"),
        *("pairs", "jumps", "swings", "judged", "errors"),
    ),
    "agents": ("sequence", "observed_at_ns", "samples", "dropped", "lost"),
}


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=False) for name in names]


def _integers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger(), nullable=False, autoincrement=False) for name in names]


def _numbers(*names: str) -> list[sa.Column[float]]:
    return [sa.Column(name, sa.Double(), nullable=True) for name in names]


def upgrade() -> None:
    """Make every table of the first release."""
    _facts()
    _labels()
    _machinery()


def _facts() -> None:
    op.create_table(
        "windows",
        *_texts("pipeline", "model", "version", "segment", "detector"),
        *_integers("window_start_ns", "window_end_ns", *_COUNTS["windows"]),
        *_numbers("share_p05", "share_p01", "mean_p", "estimated_accuracy"),
        *_texts("counts", "predicted", "raw"),
        sa.PrimaryKeyConstraint(
            "pipeline",
            "model",
            "version",
            "segment",
            "detector",
            "window_start_ns",
            "window_end_ns",
            name="pk_windows",
        ),
    )
    op.create_index(
        "ix_windows_pipeline_window_start_ns", "windows", ["pipeline", "window_start_ns"]
    )
    op.create_table(
        "drift_results",
        *_texts("pipeline", "model", "version", "test", "segment", "detector"),
        *_integers("window_start_ns", "window_end_ns"),
        sa.Column("drifted", sa.Boolean(), nullable=False),
        *_numbers("statistic", "threshold", "effect", "p_value"),
        *_integers("samples", "reference_samples", "changed_since_ns"),
        sa.PrimaryKeyConstraint(
            "pipeline",
            "model",
            "version",
            "test",
            "segment",
            "detector",
            "window_start_ns",
            "window_end_ns",
            name="pk_drift_results",
        ),
    )
    op.create_index(
        "ix_drift_results_pipeline_window_start_ns",
        "drift_results",
        ["pipeline", "window_start_ns"],
    )
    op.create_table(
        "alerts",
        *_texts("pipeline", "fingerprint"),
        *_integers("started_at_ns", "ended_at_ns"),
        *_texts("status", "rule", "severity", "model", "version", "test", "segment", "detector"),
        *_texts("labels", "evidence", "resolution"),
        sa.PrimaryKeyConstraint("pipeline", "fingerprint", "started_at_ns", name="pk_alerts"),
    )
    op.create_index("ix_alerts_pipeline_started_at_ns", "alerts", ["pipeline", "started_at_ns"])
    op.create_table(
        "flagged_samples",
        *_texts("pipeline", "model", "version", "detector", "sample_id"),
        *_integers("observed_at_ns", "occurrence"),
        *_texts("segment"),
        *_numbers("score", "p"),
        sa.PrimaryKeyConstraint(
            "pipeline",
            "model",
            "version",
            "detector",
            "sample_id",
            "observed_at_ns",
            "occurrence",
            name="pk_flagged_samples",
        ),
    )
    op.create_index(
        "ix_flagged_samples_pipeline_observed_at_ns",
        "flagged_samples",
        ["pipeline", "observed_at_ns"],
    )
    op.create_table(
        "notices",
        *_texts("pipeline", "model", "version", "source", "key"),
        *_integers("observed_at_ns"),
        *_texts("text"),
        sa.PrimaryKeyConstraint("pipeline", "model", "version", "source", "key", name="pk_notices"),
    )
    op.create_index("ix_notices_pipeline_observed_at_ns", "notices", ["pipeline", "observed_at_ns"])


def _labels() -> None:
    op.create_table(
        "predictions",
        *_texts("pipeline", "sample_id", "model", "version", "segment"),
        *_integers("observed_at_ns", "predicted"),
        *_numbers("expected_error"),
        sa.Column("label", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("pipeline", "sample_id", "model", "version", name="pk_predictions"),
    )
    op.create_index(
        "ix_predictions_pipeline_observed_at_ns", "predictions", ["pipeline", "observed_at_ns"]
    )
    op.create_table(
        "labels",
        *_texts("pipeline", "sample_id"),
        *_integers("label"),
        sa.Column("seen_ns", sa.BigInteger(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("pipeline", "sample_id", name="pk_labels"),
    )
    op.create_table(
        "label_evidence",
        *_texts("pipeline", "model", "version", "state"),
        sa.PrimaryKeyConstraint("pipeline", "model", "version", name="pk_label_evidence"),
    )


def _machinery() -> None:
    op.create_table(
        "agents",
        *_texts("pipeline", "source", "model", "version"),
        *_integers(*_COUNTS["agents"]),
        sa.Column("sampled_fraction", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", "source", name="pk_agents"),
    )
    op.create_table(
        "positions",
        *_texts("pipeline", "partition", "position"),
        sa.PrimaryKeyConstraint("pipeline", "partition", name="pk_positions"),
    )
    op.create_table(
        "outbox",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            primary_key=True,
            nullable=False,
        ),
        *_texts("pipeline", "receiver", "event_id", "type", "source", "subject"),
        *_integers("time_ns"),
        *_texts("data", "status"),
        *_integers("attempts", "not_before_ns"),
        *_texts("error"),
        *_integers("first_failed_ns", "last_failed_ns"),
        sa.PrimaryKeyConstraint("seq", name="pk_outbox"),
        sa.UniqueConstraint(
            "pipeline", "receiver", "event_id", name="uq_outbox_pipeline_receiver_event_id"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_outbox_pipeline_receiver_status_seq",
        "outbox",
        ["pipeline", "receiver", "status", "seq"],
    )
    op.create_table(
        "pipeline_state",
        *_texts("pipeline", "digest"),
        *_integers("revision"),
        *_texts("writer"),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("pipeline", name="pk_pipeline_state"),
    )
    op.create_table(
        "leases",
        *_texts("pipeline", "holder", "host", "place"),
        *_integers("pid", "started", "epoch", "beats", "expires_at_ns"),
        sa.PrimaryKeyConstraint("pipeline", name="pk_leases"),
    )
    op.create_table(
        "trigger_firings",
        *_texts("pipeline", "trigger_id", "request_id"),
        *_integers("at_ns"),
        *_texts("outcome"),
        sa.PrimaryKeyConstraint("pipeline", "trigger_id", "request_id", name="pk_trigger_firings"),
    )
    op.create_index(
        "ix_trigger_firings_pipeline_trigger_id_at_ns",
        "trigger_firings",
        ["pipeline", "trigger_id", "at_ns"],
    )


def downgrade() -> None:
    """Remove every table of the first release, and what is in it."""
    for table in (
        "trigger_firings",
        "leases",
        "pipeline_state",
        "outbox",
        "positions",
        "agents",
        "label_evidence",
        "labels",
        "predictions",
        "notices",
        "flagged_samples",
        "alerts",
        "drift_results",
        "windows",
    ):
        op.drop_table(table)

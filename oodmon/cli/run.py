"""``oodmon run``: the daemon."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from oodmon.cli.options import config_argument

if TYPE_CHECKING:
    from oodmon.calibration import Calibration
    from oodmon.config.schema import Config
    from oodmon.daemon.metrics import Metrics
    from oodmon.daemon.parts import Parts
    from oodmon.daemon.truth import Truth
    from oodmon.store.events import Store

__all__ = ["parts_of", "run"]


@click.command()
@config_argument
@click.option("--port", type=click.IntRange(0, 65535), help="Instead of the config's http.port.")
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["debug", "info", "warning", "error"]),
)
@click.pass_context
def run(context: click.Context, config: str, port: int | None, log_level: str) -> None:
    """Run the daemon of CONFIG until it is told to stop.

    SIGTERM and SIGINT end it after the open group is committed, a second SIGINT at once.

    SIGHUP or POST /-/reload reads CONFIG again: drift tests, rules, sinks, triggers and
    calibrations change; if anything is wrong with it, the old one stays in force. Model, feed,
    store and http need a restart.
    """
    from oodmon.config import build
    from oodmon.config.parse import load
    from oodmon.daemon.service import Service
    from oodmon.daemon.upkeep import Retention

    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    # They tell of every step of their own.
    for name in ("alembic", "kafka"):
        logging.getLogger(name).setLevel(logging.WARNING)
    checked = load(config, "daemon")
    half = build.daemon_half(checked)
    for hint in checked.hints:
        logging.getLogger("oodmon").warning("%s: %s", config, hint)
    parts = parts_of(checked)
    store = build.store(checked)
    service = Service(
        parts=parts,
        reader=half.feed.component.reader,
        store=store,
        retention=Retention(half.store.retention_days, half.store.max_bytes),
        http=(half.http.host, half.http.port if port is None else port),
        rebuild=lambda: parts_of(load(config, "daemon")),
    )
    logging.getLogger("oodmon").info(
        "%s version %s: detectors %s; drift tests %s; events to %s; http://%s:%s",
        checked.model.name,
        checked.model.version,
        ", ".join(parts.pipeline.calibrations),
        ", ".join(half.drift) or "none",
        ", ".join(parts.receivers) or "nobody",
        half.http.host,
        half.http.port if port is None else port or "any port",
    )
    with _inlet(checked, service.metrics, store):
        context.exit(service.run())


@contextmanager
def _inlet(config: Config, metrics: Metrics, store: Store) -> Iterator[None]:
    """The HTTP intake, where the config has one; what it accepts waits in the spool."""
    from oodmon.config import build
    from oodmon.feeds.spool import Spool

    half = build.daemon_half(config)
    feed = half.feed.component
    if half.intake is None or not isinstance(feed, Spool):
        yield
        return
    from oodmon.daemon.inlet import Inlet

    inlet = Inlet(
        half.intake,
        feed,
        config.model.name,
        config.model.version,
        metrics=metrics,
        keep_labels=None if half.labels is None else store.add_labels,
    )
    inlet.start()
    logging.getLogger("oodmon").info("intake: listening on %s:%d", half.intake.host, inlet.port)
    try:
        yield
    finally:
        inlet.stop()


def parts_of(config: Config) -> Parts:
    """What the daemon is made of and a reload may change."""
    from oodmon.config import build
    from oodmon.daemon.parts import Parts
    from oodmon.daemon.routes import Routes, sink_receiver, trigger_receiver

    half = build.daemon_half(config)
    sinks = build.sinks(config)
    guards = build.triggers(config)
    pipeline = build.pipeline(config)
    return Parts(
        pipeline=pipeline,
        routes=Routes(
            {name: built.events for name, built in sinks.items()}, build.rule_triggers(config)
        ),
        receivers={
            **{sink_receiver(name): built.component for name, built in sinks.items()},
            **{trigger_receiver(name): guard for name, guard in guards.items()},
        },
        flag_level=half.flag_level,
        calibrated={
            name: build.calibration_path(half.calibration.path, name).stat().st_mtime
            for name in pipeline.calibrations
        },
        labelling=half.labels,
        truth=truth_of(config, pipeline.calibrations),
        label_topic=None if half.labels is None else half.labels.topic,
    )


def truth_of(config: Config, known: Mapping[str, Calibration]) -> Truth | None:
    """What judges labels that come late, where a rule reads it."""
    from oodmon.config import build
    from oodmon.daemon.truth import Truth
    from oodmon.errors import StateError

    half = build.daemon_half(config)
    rules = build.label_rules(config)
    if half.labels is None or not rules:
        return None
    reference = max(((one.labelled, one.wrong) for one in known.values()), default=(0, 0))
    if not reference[0] and not half.labels.least_accuracy:
        raise StateError(
            f"daemon.rules.{next(iter(rules))} is on labels, and no calibration in "
            f"{half.calibration.path} knows how often the model is wrong: run `oodmon fit` on "
            "labelled data again, or say daemon.labels.least_accuracy"
        )
    return Truth(half.labels, reference, rules, config.model.name, config.model.version)

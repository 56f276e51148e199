"""Going on from a frozen pipeline, and the daemon's own events about what it met on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from oodmon.daemon.intake import Fold
from oodmon.daemon.parts import Parts
from oodmon.errors import ContractError, OodmonError, StoreError
from oodmon.records import Event
from oodmon.store.events import Store
from oodmon.wire import event_source

__all__ = ["emit", "rebuilt", "thaw"]

_log = logging.getLogger(__name__)


def thaw(pipeline: Fold, state: bytes) -> Exception | None:
    """Go on from a state, or begin anew where it cannot be read any more: what was wrong."""
    fresh = pipeline.freeze()
    try:
        pipeline.thaw(state)
    except Exception as error:
        pipeline.thaw(fresh)
        _log.warning("the pipeline begins anew: its state does not fit", exc_info=True)
        return error
    return None


def rebuilt(rebuild: Callable[[], Parts], mine: Fold) -> Parts | Exception:
    """What the configuration makes now, of the same model; or what is wrong with it."""
    try:
        parts = rebuild()
        _same_model(mine, parts.pipeline)
    except Exception as error:
        expected = isinstance(error, OodmonError)
        _log.error(  # a traceback only for what is not the user's mistake
            "reload failed, the configuration in force stays: %s", error, exc_info=not expected
        )
        return error
    return parts


def _same_model(mine: Fold, new: Fold) -> None:
    if (new.model, new.version) != (mine.model, mine.version):
        raise ContractError(
            f"this daemon watches {mine.model}/{mine.version}, the configuration says "
            f"{new.model}/{new.version}: another model needs a restart"
        )


def emit(
    store: Store, watchers: Sequence[str], pipeline: Fold, what: str, error: Exception, now_ns: int
) -> None:
    """Queue an event of the daemon's own for the sinks that take notices."""
    source = event_source(pipeline.model, pipeline.version)
    event = Event(
        id=f"{what}-{pipeline.model}-{pipeline.version}-{now_ns}",
        type=f"oodmon.daemon.{what}.v1",
        source=source,
        subject=source,
        time=now_ns,
        data={"model": pipeline.model, "version": pipeline.version, "error": str(error)},
    )
    try:
        store.emit([(receiver, event) for receiver in watchers])
    except StoreError as failure:
        _log.warning("%s could not be told: %s", event.type, failure)

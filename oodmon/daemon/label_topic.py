"""A thread that reads labels from a topic: into the store together with how far it read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from oodmon.daemon.bodies import labels_of
from oodmon.daemon.intake import reason_on
from oodmon.daemon.metrics import Metrics
from oodmon.daemon.routes import Routes
from oodmon.errors import OodmonError, WireError
from oodmon.feeds.labels import LabelReader, LabelTopic, Message
from oodmon.records import Event, Notice
from oodmon.store.events import Store

__all__ = ["LabelIntake"]

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 500
"""Messages in one transaction, at most."""
_MOST_LABELS: Final = 10_000
"""Labels in one transaction, but for those of its last message."""
_POLL_SECONDS: Final = 0.5
_JOIN_SECONDS: Final = 5.0
_FIRST_SECONDS: Final = 0.5
_LONGEST_SECONDS: Final = 30.0


class LabelIntake:
    """Takes what comes until it is stopped; what fails is told, and tried again.

    A message is what ``POST /v1/labels`` takes. Labels, offsets, and what there is to tell of
    messages that are none are one transaction, so a crash loses none and takes none twice; and
    twice would do no harm.

    Args:
        topic: where labels come from.
        store: open while the thread runs.
        metrics: where messages are counted.
        model, version: what is served, for notices.
        routes: whom notices are told.
        wake: called with those that have something to take.
    """

    def __init__(
        self,
        topic: LabelTopic,
        store: Store,
        metrics: Metrics,
        model: str,
        version: str,
        routes: Callable[[], Routes],
        wake: Callable[[set[str]], None],
    ) -> None:
        self._topic = topic
        self._store = store
        self._metrics = metrics
        self._model, self._version = model, version
        self._routes = routes
        self._wake = wake
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.state = "starting"
        for result in ("accepted", "rejected"):
            metrics.add("oodmon_label_messages_total", 0, result=result)

    def start(self) -> None:
        """Begin where the store says that it was."""
        self._end.clear()
        self._thread = threading.Thread(target=self._run, name="labels", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the transaction that runs. Safe twice, safe without `start`."""
        self._end.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        reader = self._topic.reader()
        pause, sought = _FIRST_SECONDS, False
        while not self._end.is_set():
            try:
                if not sought:
                    reader.seek(self._store.label_positions())
                    sought = True
                self._turn(reader)
            except Exception as error:
                sought = False  # what was taken and not stored comes again
                self._failed(error)
                self._end.wait(pause)
                pause = min(2.0 * pause, _LONGEST_SECONDS)
            else:
                self.state, pause = "ok", _FIRST_SECONDS
        reader.close()

    def _failed(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        if why != self.state:
            expected = isinstance(error, OodmonError)
            _log.warning("labels: %s", why, exc_info=None if expected else error)
        self.state = why

    def _turn(self, reader: LabelReader) -> None:
        messages = reader.poll(_AT_ONCE, _POLL_SECONDS)
        for gap in reader.gone:
            _log.warning("labels: %s", gap)
        reader.gone.clear()
        taken = 0
        while taken < len(messages):
            taken += self._take(reader, messages[taken:])

    def _take(self, reader: LabelReader, messages: Sequence[Message]) -> int:
        """Store the first messages, as many as hold so many labels: how many."""
        labels: dict[str, int] = {}
        positions: dict[str, str] = {}
        notices: dict[str, Notice] = {}
        taken = rejected = 0
        for message in messages:
            if len(labels) >= _MOST_LABELS:
                break
            taken += 1
            positions[message.partition] = str(message.offset + 1)
            try:
                found = labels_of(message.value)
            except WireError as error:
                rejected += 1
                notice = self._notice(message, str(error))
                notices.setdefault(notice.key, notice)
                continue
            for name, label in found.items():
                # The last word on a sample is the one that came last.
                labels.pop(name, None)
                labels[name] = label
        routes = self._routes()
        outbox: list[tuple[str, Event]] = [p for one in notices.values() for p in routes(one)]
        self._store.take_labels(labels, positions, list(notices.values()), outbox)
        reader.settle(positions)
        for notice in notices.values():
            _log.warning("labels: %s", notice.text)
        count = self._metrics.add
        count("oodmon_label_messages_total", taken - rejected, result="accepted")
        count("oodmon_label_messages_total", rejected, result="rejected")
        self._wake({receiver for receiver, _ in outbox})
        return taken

    def _notice(self, message: Message, why: str) -> Notice:
        """One per reason and day, with the same key however often the message comes."""
        key = f"{message.partition}:{reason_on(why, message.at)}"
        text = (
            f"a message of {message.partition} at offset {message.offset} holds no labels: {why}; "
            "it was passed by"
        )
        return Notice(self._model, self._version, "labels", message.at, key, text)

"""Facts → one self-contained HTML file: what alarmed, why, and what it looked like."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from oodmon.errors import StoreError
from oodmon.report import plots
from oodmon.report.accuracy import labelled
from oodmon.report.canvas import page
from oodmon.report.gather import Seen, gather
from oodmon.report.thumbnails import thumbnails as read_thumbnails
from oodmon.secret import Secret
from oodmon.store.events import Store
from oodmon.store.labels import Measured

__all__ = ["build"]

_FOLDER: Final = Path(__file__).parent
_MANY_CLASSES: Final = 1


def build(
    store_url: str | Secret,
    out_path: str | Path,
    *,
    model: str | None = None,
    version: str | None = None,
    thumbnails: str | Path | None = None,
    pipeline: str = "default",
    promises: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of one model version and return where it is.

    The file asks nothing of the network: styles, figures and pictures are inside.

    Args:
        store_url: the daemon's database.
        out_path: the HTML file to write; its folder is made.
        model, version: what to report on; by default what was seen last.
        thumbnails: pictures of samples, a folder or an ``.npz`` file (`report.thumbnails`).
        pipeline: the daemon's name in a shared database.
        promises: drift test → how often it may be wrong, in words; else only alerts tell it.

    Errors:
        `StoreError` where the database cannot be read, or holds no window of that model.
    """
    store = Store(store_url, pipeline)
    store.open()
    try:
        seen = gather(store, model, version, promises or {})
        known = labelled(store, seen.model, seen.version, seen.changed_at) if seen else []
    finally:
        store.close()
    if seen is None:
        of = f" of {model}" + (f"/{version}" if version else "") if model else ""
        raise StoreError(f"there is nothing to report: the database holds no closed window{of}")
    pictures = (
        {}
        if thumbnails is None
        else read_thumbnails(Path(thumbnails), [row["sample_id"] for row in seen.novel])
    )
    path = Path(out_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(seen, known, pictures), encoding="utf-8")
    return path


def _page(seen: Seen, known: Sequence[tuple[str, Measured]], pictures: Any) -> str:
    script = (_FOLDER / "slider.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page(
        "page.html.j2",
        flags=json.dumps([asdict(one) for one in seen.flags], separators=(",", ":")),
        script=Markup(script),  # noqa: S704 - ours
        script_digest=f"sha256-{digest}",
        seen=seen,
        known=known,
        pictures=pictures,
        figures={name: Markup(svg) for name, svg in _figures(seen).items()},  # noqa: S704 - ours
        last=int(seen.timeline.ends[-1]),
        first=int(seen.timeline.starts[0]),
    )


def _figures(seen: Seen) -> dict[str, str]:
    """Name → SVG; text in it is escaped by matplotlib."""
    timeline = seen.timeline
    bounds = int(timeline.starts[0]), int(timeline.ends[-1])
    alarms: dict[str, list[tuple[int, int]]] = {}
    for alert in seen.alerts:
        span = int(alert["started_at_ns"]), int(alert["ended_at_ns"]) or bounds[1]
        alarms.setdefault(alert["test"], []).append(span)
    figures = {}
    if seen.lines:
        figures["evidence"] = plots.evidence(seen.lines, bounds, alarms, seen.changed_at)
    if timeline.counts:
        figures["shares"] = plots.shares(
            timeline, bounds, [span for spans in alarms.values() for span in spans], seen.changed_at
        )
        figures["heat"] = plots.heat(timeline, bounds, seen.changed_at)
        figures["tails"] = plots.tails(seen.before, seen.after)
    if len(seen.classes) > _MANY_CLASSES:
        figures["classes"] = plots.classes(seen.classes)
    return figures

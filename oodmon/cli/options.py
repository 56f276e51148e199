"""Arguments that several verbs share, and how times and sizes are shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    _Seconds = click.ParamType[float]
else:
    _Seconds = click.ParamType

__all__ = ["Duration", "config_argument", "config_option", "when"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SECOND: Final = 1_000_000_000

config_argument: Callable[..., Any] = click.argument(
    "config", default="oodmon.yaml", type=click.Path(dir_okay=False)
)

config_option: Callable[..., Any] = click.option(
    "--config",
    "-c",
    default="oodmon.yaml",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="The config file.",
)


class Duration(_Seconds):
    """A span such as ``90s``, ``15m``, ``6h``, ``7d``, in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds; a number without a unit is seconds already."""
        if isinstance(value, (int, float)):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", str(value).strip())
        if found is None:
            self.fail("expected a span such as 90s, 15m, 6h or 7d", param, ctx)
        return float(found.group(1)) * _UNITS[found.group(2) or "s"]


def when(ns: int) -> str:
    """A time for people: local, to the second; "-" where there is none."""
    if not ns:
        return "-"
    return datetime.fromtimestamp(ns / _SECOND, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")

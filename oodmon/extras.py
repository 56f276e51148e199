"""Which extra brings a package that is not there: for messages that say what to install."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["EXTRAS", "install"]

EXTRAS: Final[Mapping[str, str]] = {
    "torch": "torch",
    "kafka": "kafka",
    "grafana_client": "grafana",
    "psycopg": "postgres",
    "jinja2": "report",
    "matplotlib": "report",
    "faiss": "faiss",
}
"""Module → the extra of pyproject.toml that installs it."""


def install(module: str) -> str:
    """The command that installs it; "" where no extra does."""
    extra = EXTRAS.get(module.partition(".")[0])
    return f"pip install 'oodmon[{extra}]'" if extra else ""

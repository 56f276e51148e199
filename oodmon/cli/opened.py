"""The store of a config, open for as long as a verb reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from oodmon.store.events import Store

__all__ = ["opened_store"]


@contextmanager
def opened_store(config: str) -> Iterator[Store]:
    """Open the store that the daemon half of a config names, and close it again."""
    from pathlib import Path

    from oodmon.config.build import daemon_half, store
    from oodmon.config.parse import load

    checked = load(config, "daemon")
    url = daemon_half(checked).store.url
    file = url.partition(":///")[2] if url.startswith("sqlite") else ""
    if file and file != ":memory:" and not file.startswith("file:") and not Path(file).exists():
        raise click.ClickException(f"there is no database {file} yet; `oodmon run` makes it")
    found = store(checked)
    found.open()
    try:
        yield found
    finally:
        found.close()

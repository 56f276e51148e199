"""Progress of long verbs on standard error."""

from __future__ import annotations

from typing import Any, Self

__all__ = ["Bars"]


class Bars:
    """One progress bar per stage; a context, and what is told how far a stage is."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: float, note: str) -> None:
        """A stage is so far; its bar appears with its first call."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, note="")
        self._progress.update(self._tasks[stage], completed=done, note=note)

"""``oodmon report``: one self-contained HTML file about what was seen."""

from __future__ import annotations

from pathlib import Path

import click

from oodmon.cli.opened import opened_store
from oodmon.cli.options import config_argument

__all__ = ["report"]


@click.command()
@config_argument
@click.option(
    "--output",
    "-o",
    default="oodmon-report.html",
    show_default=True,
    type=click.Path(dir_okay=False),
)
@click.option(
    "--thumbnails",
    type=click.Path(exists=True),
    help="Pictures of samples by their ids, a folder or an .npz, shown for the most novel ones.",
)
def report(config: str, output: str, thumbnails: str | None) -> None:
    """Write scores, windows, drift evidence, alarms and the most novel samples as one HTML file."""
    from oodmon.config.build import daemon_half
    from oodmon.config.parse import load
    from oodmon.pipeline import promises

    checked = load(config, "daemon")
    half = daemon_half(checked)
    section = half.store
    with opened_store(config):
        pass  # says in plain words where there is no database yet
    try:
        from oodmon.report import build
    except ImportError as error:
        raise click.UsageError(
            f"the report needs plots: pip install 'oodmon[report]' ({error})"
        ) from None
    written = build(
        section.url,
        Path(output),
        model=checked.model.name,
        version=checked.model.version,
        thumbnails=thumbnails,
        pipeline=section.pipeline,
        promises=promises(half.windows, {n: test.component for n, test in half.drift.items()}),
    )
    click.echo(f"wrote {written}")

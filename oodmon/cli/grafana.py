"""``oodmon grafana push``: folder and dashboards through Grafana's HTTP API."""

from __future__ import annotations

import os

import click

__all__ = ["grafana"]


@click.group()
def grafana() -> None:
    """Work with Grafana."""


@grafana.command()
@click.option("--url", envvar="GRAFANA_URL", help="Of Grafana.  [env: GRAFANA_URL]")
@click.option("--folder", default="oodmon", show_default=True, help="Title of the folder.")
@click.option("--ca-file", default="", help="PEM file of certification authorities.")
@click.option(
    "--config", "-c", type=click.Path(dir_okay=False), help="Take url and token from its sink."
)
def push(url: str | None, folder: str, ca_file: str, config: str | None) -> None:
    """Create or update the dashboards; pushing again changes nothing.

    The token of a service account that may write folders and dashboards comes from GRAFANA_TOKEN,
    or from the grafana sink of a config; never from the command line, which others can see.
    """
    from oodmon.secret import Secret
    from oodmon.sinks.grafana import push as push_boards

    token = Secret(os.environ.get("GRAFANA_TOKEN", ""))
    if config is not None:
        from oodmon.config.build import sinks
        from oodmon.config.parse import load

        found = [b.component for b in sinks(load(config, "daemon")).values()]
        sink = next((s for s in found if s.name == "grafana"), None)
        if sink is None:
            raise click.UsageError(f"{config} has no sink of type grafana")
        url = url or sink.url  # type: ignore[attr-defined]  # an option of this sink
        token = token or sink.token  # type: ignore[attr-defined]
        ca_file = ca_file or sink.ca_file  # type: ignore[attr-defined]
    if not url:
        raise click.UsageError("where is Grafana? give --url, GRAFANA_URL or --config")
    for board in push_boards(url, token, folder, ca_file=ca_file):
        click.echo(f"{board.status:<9} {board.url}")

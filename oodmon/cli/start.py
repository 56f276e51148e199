"""``oodmon init`` and ``oodmon check``: the first config, and what is wrong with one."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Final

import click

from oodmon.cli.data import require_torch
from oodmon.cli.named import model_of
from oodmon.cli.options import config_argument
from oodmon.cli.program import MISUSED

__all__ = ["check", "init"]

_PLAIN: Final = frozenset({"model", "net", "network", "classifier", "make", "build", "load"})

_TEMPLATE: Final = Template("""\
# oodmon watches the model `$name`. Every option that is not here has a default: `oodmon catalog`
# lists the components, docs/config.md the options. Secrets come from the environment: "$${NAME}".

model: {name: $quoted, version: "1"}

# Beside the model: `oodmon.attach(model, "$file")` in the serving process.
agent:
  tap:
    type: hooks
    layers: auto
    overhead_budget: 0.01     # share of the serving time that watching may cost
$layers  detectors:
    msp: {type: msp}          # from the logits alone, and nearly free
    energy: {type: energy}
    # From features. `oodmon fit` learns what they need.
    gram: {type: gram}
    # With labelled data: how often the model is wrong, estimated in service without labels.
    # error: {type: expected_error}
  states: states/             # `oodmon fit` writes here
  feed: {type: spool, path: spool/}

# Beside the database: `oodmon run $file`. Needs no torch.
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  flag_level: 0.001           # samples with a tail probability of at most this are kept by name
  windows: {length_seconds: 60, every_seconds: 0, allowed_lateness_seconds: 10}
  drift:
    # How often it may be wrong, and how much change does not matter.
    budget: {type: budget, false_alarms: "1 per 30 days", tolerated_fraction: 0.005}
    # Does it matter: looks at `error` alone. A rule that reads it tells whom.
    # worse: {type: accuracy_loss, false_alarms: "1 per 30 days", tolerated_loss: 0.02}
  rules:
    drift: {drift: budget, severity: warning, for_windows: 1, resolve_after_windows: 3}
  store: {url: "sqlite:///oodmon.db"}
  # labels: {share: 0.2}      # keep answers by sample id: true classes that come later judge them
  sinks:
    log: {type: log}
    # alerts: {type: kafka, bootstrap_servers: ["localhost:9092"], topic: oodmon.alerts}
    # grafana: {type: grafana, url: "http://localhost:3000", token: "$${GRAFANA_TOKEN}"}
  # triggers:                 # name them in a rule: `triggers: [retrain]`
  #   retrain: {type: webhook, url: "https://ci/retrain", cooldown_seconds: 86400,
  #             daily_quota: 1, dry_run: true}
  http: {host: 127.0.0.1, port: 9464}
""")


@click.command()
@click.argument("path", default="oodmon.yaml", type=click.Path(dir_okay=False))
@click.option("--model", help="The model, as package.module:name; its layers are written in.")
@click.option("--name", help="What to call it; by default the name in --model.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: str, model: str | None, name: str | None, force: bool) -> None:
    """Write a first config to PATH, with comments, for a given model."""
    target = Path(path)
    if target.exists() and not force:
        raise click.UsageError(f"{path} is there already; --force replaces it")
    layers = _layers(model) if model else ()
    called = name or _called(model or "model")
    if not re.fullmatch(r"[\w.-]+", called):
        raise click.BadParameter("letters, digits, `.`, `_` and `-` only", param_hint="--name")
    found = "".join(f"    # {line}\n" for line in layers)
    text = _TEMPLATE.substitute(name=called, quoted=f'"{called}"', file=target.name, layers=found)
    target.write_text(text, encoding="utf-8")
    for line in layers:
        click.echo(line)
    then = f" --model {model}   (the function returns the data)" if model else ""
    click.echo(f"wrote {path}; next: oodmon fit {path} package.module:function{then}")


def _called(model: str) -> str:
    """A name for the model: that of the object, or of its module where it is just `model`."""
    module, _, path = model.rpartition(":")
    own = path.rpartition(".")[2]
    return module.rpartition(".")[2] if module and own in _PLAIN else own


def _layers(model: str) -> tuple[str, ...]:
    """What the tap finds in the model, in words."""
    require_torch("--model")
    from oodmon.taps.layout import discover

    found = model_of(model)
    return ("`layers: auto` finds in this model:", *discover(found).lines)


@click.command()
@config_argument
@click.option(
    "--half",
    type=click.Choice(["both", "agent", "daemon"]),
    default="both",
    show_default=True,
    help="Which half to check.",
)
@click.option("--strict", is_flag=True, help="What is probably not meant is a problem too.")
@click.pass_context
def check(context: click.Context, config: str, half: str, strict: bool) -> None:
    """Tell every problem of CONFIG at once, with its line and column.

    Checking the agent half imports the detectors, and so torch. Where torch is not installed, that
    half is skipped unless it was asked for.
    """
    from oodmon.config.parse import load

    skipped = half == "both" and find_spec("torch") is None
    wanted = "daemon" if skipped else half
    checked = load(config, wanted)  # type: ignore[arg-type]  # click gave one of the three
    if checked.agent is not None:
        detectors = ", ".join(checked.agent.detectors)
        click.echo(f"agent: {checked.agent.tap.component.type} tap, detectors {detectors}")
    elif skipped and checked.detectors:
        click.echo("agent: skipped, torch is not installed")
    if checked.daemon is not None:
        parts = [
            f"{len(entities)} {what}{'' if len(entities) == 1 else 's'}"
            for what, entities in (
                ("drift test", checked.daemon.drift),
                ("rule", checked.daemon.rules),
                ("sink", checked.daemon.sinks),
                ("trigger", checked.daemon.triggers),
            )
        ]
        click.echo(f"daemon: {', '.join(parts)}")
    for hint in checked.hints:
        click.echo(f"hint: {hint}", err=True)
    if strict and checked.hints:
        context.exit(MISUSED)
    click.echo(f"{config}: no problems")

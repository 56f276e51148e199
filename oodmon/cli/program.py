"""The `oodmon` command: its verbs, found when they are called, and what a failure looks like.

A verb's module is imported when the verb runs, and imports what is heavy inside the verb, so that
``oodmon --help`` starts in a blink and the daemon's verbs never import torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

import click

from oodmon import __version__

__all__ = ["FAILED", "INTERRUPTED", "MISUSED", "Program", "main"]

FAILED: Final = 1
"""Exit status: it was tried and did not work."""
MISUSED: Final = 2
"""Exit status: the command line or the config has problems."""
INTERRUPTED: Final = 130
"""Exit status: Ctrl-C, as shells say it."""

_VERBS: Final[Mapping[str, tuple[str, str]]] = {
    "init": ("start", "Write a commented config for a model."),
    "check": ("start", "Tell every problem of a config."),
    "fit": ("fit", "Learn states and calibrations from reference data."),
    "evaluate": ("evaluate", "Tell how well the detectors separate named data sets."),
    "advise": ("advise", "Try detectors on reference data, and propose a set for a cost."),
    "plan": ("plan", "Simulate a config's drift tests: what they promise and cost."),
    "run": ("run", "Run the daemon."),
    "accept": ("accept", "Adopt what is seen now as the new reference."),
    "labels": ("labels", "Hand over true classes that became known later."),
    "recalibrate": ("recalibrate", "Set the estimated accuracy right by those labels."),
    "replay": ("replay", "Show what a config would have alarmed on."),
    "status": ("watch", "Show where everything stands."),
    "tail": ("watch", "Follow alerts and notices."),
    "events": ("events", "List and replay events that could not be delivered."),
    "report": ("report", "Write one HTML file about what was seen."),
    "catalog": ("catalog", "List every component there is."),
    "conform": ("catalog", "Hold a component to its contract."),
    "grafana": ("grafana", "Push folder and dashboards to Grafana."),
}


class Program(click.Group):
    """Looks verbs up by name and turns what oodmon raises into one message and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order in which a newcomer meets them."""
        del ctx
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the one module that holds the verb."""
        del ctx
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"oodmon.cli.{_VERBS[cmd_name][0]}")
        return cast("click.Command", getattr(module, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any of them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; `--debug` shows the traceback of what fails."""
        try:
            return super().invoke(ctx)
        except click.ClickException as told:
            if ctx.params.get("debug") and told.__cause__ is not None:
                raise told.__cause__ from None
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read the output has seen enough; nothing more can be written to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(FAILED)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            message, status = _told(error)
            click.echo(message, err=True)
            ctx.exit(status)


def _told(error: Exception) -> tuple[str, int]:
    """What to say about a failure, and the exit status."""
    from oodmon.errors import ConfigError, ContractError, OodmonError, RegistryError
    from oodmon.extras import install

    if isinstance(error, ConfigError):
        count = len(error.problems)
        return f"{error}\n{count} problem{'s' if count != 1 else ''}", MISUSED
    if isinstance(error, (ContractError, RegistryError)):
        return f"oodmon: {error}", MISUSED
    if isinstance(error, OodmonError):
        return f"oodmon: {error}", FAILED
    if isinstance(error, ModuleNotFoundError) and (how := install(error.name or "")):
        return f"oodmon: {error.name} is not installed: {how}", MISUSED
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"oodmon: {where}{error.strerror}", FAILED
    kind = type(error).__name__
    return f"oodmon: unexpected {kind}: {error} (`oodmon --debug …` shows where)", FAILED


@click.command(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 it worked, 1 it failed, 2 the command line or the config has problems, "
    "130 it was interrupted.",
)
@click.version_option(__version__, prog_name="oodmon")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def main(debug: bool) -> None:
    """Watch a deployed PyTorch model: out-of-distribution scores, drift, alerts, retraining."""
    del debug  # read by `Program.invoke`

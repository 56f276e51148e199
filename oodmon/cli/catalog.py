"""``oodmon catalog`` and ``oodmon conform``: what components there are, and whether they hold."""

from __future__ import annotations

import inspect
import json
import logging
from importlib.util import find_spec
from typing import Any, Final

import click

from oodmon.cli.program import FAILED

__all__ = ["catalog", "conform", "rows_of"]

_WIDTH: Final = 14
_LAYERS: Final = ("stage", "features")  # what a model may have, for detectors that read any
_KINDS: Final = ("taps", "detectors", "feeds", "drift", "sinks", "triggers")


@click.command()
@click.argument("kind", required=False, type=click.Choice(_KINDS))
@click.option("--json", "as_json", is_flag=True, help="One JSON array, for programs.")
@click.option("--options", is_flag=True, help="With the options of each component.")
@click.option("--markdown", is_flag=True, help="A table and a section each, for a page of docs.")
def catalog(kind: str | None, as_json: bool, options: bool, markdown: bool) -> None:
    """List every component there is, plugins included: of one KIND or of all.

    Of a detector it tells what it reads and what it costs per sample beside the forward pass: C
    classes, D features, N stored samples, HW positions of a map. A plugin that cannot be imported
    is listed with the reason; it is an error only where a config names it.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown: give one of them")
    rows = [row for name in ([kind] if kind else _KINDS) for row in rows_of(name)]
    if markdown:
        from oodmon.cli.markdown import entries, overview

        for name in dict.fromkeys(row["kind"] for row in rows):
            of_kind = [row for row in rows if row["kind"] == name]
            click.echo(f"## {name}\n\n{overview(of_kind)}\n{entries(of_kind)}")
        return
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    kinds_shown = dict.fromkeys(row["kind"] for row in rows)
    for shown in kinds_shown:
        click.echo(click.style(shown, bold=True))
        for row in rows:
            if row["kind"] == shown:
                for line in _lines(row, options):
                    click.echo(line)


def _lines(row: dict[str, Any], options: bool) -> list[str]:
    if "broken" in row:
        return [f"  {row['name']:<{_WIDTH}} {click.style('broken', fg='red')}: {row['broken']}"]
    lines = [f"  {row['name']:<{_WIDTH}} {row['summary']}"]
    notes = [row["stability"], row["module"]]
    notes += [f"reads {row['reads']}"] if row["reads"] else []
    notes += [f"costs {row['cost']}"] if row["cost"] else []
    notes += [row["paper"]] if row["paper"] else []
    lines.append(f"  {'':<{_WIDTH}} {click.style(' · '.join(notes), dim=True)}")
    if options:
        lines += [
            f"  {'':<{_WIDTH}} {option['name']}: {option['takes']}"
            + (" (required)" if option["default"] is None else f" = {option['default']}")
            for option in row["options"]
        ]
    return lines


def rows_of(kind: str) -> list[dict[str, Any]]:
    """What is known of every component of a kind, broken plugins last."""
    from oodmon.registry import kinds

    registry = kinds[kind]
    rows: list[dict[str, Any]] = []
    for name in registry.names():
        cls = registry.get(name)
        paper = getattr(cls, "paper", None)
        rows.append(
            {
                "kind": kind,
                "name": name,
                "stability": getattr(cls, "stability", ""),
                "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
                "module": cls.__module__,
                "doc": inspect.getdoc(cls) or "",
                "paper": f"{paper.authors}, {paper.venue} {paper.year}" if paper else "",
                "title": paper.title if paper else "",
                "url": paper.url if paper else "",
                "reads": _reads(cls),
                "cost": getattr(cls, "cost", ""),
                "options": _options(cls),
            }
        )
    broken = dict(registry.broken())
    if find_spec("torch") is None:
        # Not each module of the folder is a component, and none of them is at fault.
        torchless = [
            name
            for name, why in broken.items()
            if why.startswith(f"oodmon.{kind}.") and "'torch'" in why
        ]
        for name in torchless:
            del broken[name]
        if torchless:
            why = "torch is not installed: pip install 'oodmon[torch]'"
            broken[f"built-in {kind}"] = why
    rows += [{"kind": kind, "name": name, "broken": why} for name, why in sorted(broken.items())]
    return rows


def _reads(cls: type[Any]) -> str:
    """What a detector with its default options looks at; "" for everything else."""
    from oodmon.contracts import Detector

    if not issubclass(cls, Detector):
        return ""
    try:
        reads = cls().pin(_LAYERS).reads()
    except Exception:  # no defaults: it depends on its options
        return "what its options name"
    parts = [("", "a layer", "layers")[min(len(reads.layers), 2)]]
    parts += [what for what in ("logits", "inputs") if getattr(reads, what)]
    parts += ["further passes of the model"] if reads.model else []
    parts += ["labels while learning"] if reads.labels else []
    return ", ".join(part for part in parts if part)


def _options(cls: type[Any]) -> list[dict[str, Any]]:
    import dataclasses

    from oodmon.config.wording import describe
    from oodmon.registry import options_of

    found = []
    for name, (option, annotation) in options_of(cls).items():
        default = None
        if option.default is not dataclasses.MISSING:
            default = repr(option.default)
        elif option.default_factory is not dataclasses.MISSING:
            default = repr(option.default_factory())
        found.append({"name": name, "takes": describe(annotation), "default": default})
    return found


@click.command()
@click.argument("component", required=False)
@click.option("--quiet", is_flag=True, help="Show what fails alone.")
@click.pass_context
def conform(context: click.Context, component: str | None, quiet: bool) -> None:
    """Hold a component to its contract: COMPONENT is kind.name, a kind, or nothing for all.

    These are the checks that every built-in passes; plugins can run them here and in their tests.
    """
    from oodmon.checks import conform as hold
    from oodmon.registry import kinds

    kind, _, name = (component or "").partition(".")
    if kind and kind not in _KINDS:
        raise click.UsageError(f"COMPONENT: no kind {kind!r}; there are {', '.join(_KINDS)}")
    # what a check provokes is logged, and would look like a failure here
    nowhere = logging.NullHandler()
    logging.getLogger().addHandler(nowhere)
    context.call_on_close(lambda: logging.getLogger().removeHandler(nowhere))
    failed = total = 0
    for each in [kind] if kind else _KINDS:
        for one in [name] if name else kinds[each].names():
            for outcome in hold(each, one):
                total += 1
                failed += not outcome.passed
                if not (quiet and outcome.passed):
                    click.echo(_line(f"{each}.{one}", outcome))
    click.echo(f"{total - failed} of {total} checks passed")
    if failed or not total:
        context.exit(FAILED)


def _line(component: str, outcome: Any) -> str:
    mark = click.style("ok  ", fg="green") if outcome.passed else click.style("FAIL", fg="red")
    why = "" if outcome.passed else f": {outcome.message}"
    return f"{mark} {component} {outcome.check}{why}"

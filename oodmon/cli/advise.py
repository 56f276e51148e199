"""``oodmon advise``: which detectors suit a model, and which to run together for a cost."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.cli.bars import Bars
from oodmon.cli.data import Form, data_options, model_and_source, require_torch
from oodmon.cli.options import config_argument

if TYPE_CHECKING:
    from torch import nn

    from oodmon.contracts import Tap
    from oodmon.fitting import Fitting, Source
    from oodmon.fitting.advice import Advice

__all__ = ["advise", "after_fit", "tell"]

_BLIND: Final = 0.6
"""An AUROC below this is hardly better than chance, and is shown as such."""

_TENS: Final = 10
"""Microseconds from which on tenths do not matter."""

_WIDE: Final = 120
"""Columns of a terminal that has room for who agrees with whom."""

_QUICK_SAMPLES: Final = 20_000
"""Of a data set that `oodmon fit` reads once more without being asked."""

_QUICK_HELD: Final = 256
_QUICK_SECONDS: Final = 10.0
_QUICK_LEARNT: Final = 2.0
"""What took `oodmon fit` longer to learn does not learn again without a class."""


@click.command()
@config_argument
@click.argument("data")
@data_options
@click.option("--learn-share", default=0.5, show_default=True, help="As in `oodmon fit`.")
@click.option("--seed", default=0, show_default=True, help="As in `oodmon fit`.")
@click.option("--in-order", is_flag=True, help="DATA is in the order as served.")
@click.option("--configured", is_flag=True, help="Try the detectors of CONFIG alone.")
@click.option(
    "--budget",
    default=0.0,
    type=click.FloatRange(min=0.0),
    help="Microseconds per sample for all together; 0: as much as the model's own pass.",
)
@click.option(
    "--samples", default=512, show_default=True, type=click.IntRange(16), help="Held out."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def advise(
    config: str,
    data: str,
    model: str | None,
    transform: str | None,
    learn_share: float,
    seed: int,
    batch_size: int,
    device: str,
    in_order: bool,
    configured: bool,
    budget: float,
    samples: int,
    as_json: bool,
    image_size: tuple[int, int] | None,
    image_mode: str,
) -> None:
    """Try detectors on DATA, and propose a set for a cost.

    DATA is in-distribution data as for `oodmon fit`; nothing else is needed, and nothing is
    written. Held-out samples are set against corrupted copies of themselves, and, where DATA has
    labels, against classes that were kept from detector and head. Tried are the detectors of
    CONFIG, and every other that is quick to learn.
    """
    if not 0.0 < learn_share < 1.0:
        raise click.BadParameter(f"{learn_share} is not in (0, 1)", param_hint="--learn-share")
    require_torch("advising")
    from oodmon.config.build import agent_half
    from oodmon.config.parse import load
    from oodmon.fitting.advice import advise as find
    from oodmon.fitting.advice import catalogue

    half = agent_half(load(config, "agent"))
    form = Form(transform, batch_size, seed, image_size, image_mode)
    found, source = model_and_source(data, model, form)
    candidates = {name: entity.component for name, entity in half.detectors.items()}
    others: dict[str, str] = {}
    if not configured:
        quick, others = catalogue()
        tried = set(candidates.values())
        candidates = {n: d for n, d in quick.items() if d not in tried} | candidates
        others = {name: why for name, why in others.items() if name not in candidates}
    with Bars() as bars:
        advice = find(
            found,
            source,
            tap=half.tap.component.component,
            candidates=candidates,
            learn_share=learn_share,
            seed=seed,
            device=device,
            in_order=in_order,
            budget=budget,
            held_samples=samples,
            progress=bars,
        )
    if as_json:
        click.echo(json.dumps(advice.as_json() | {"not_tried": others}, indent=2))
        return
    tell(advice, others)


def after_fit(
    model: nn.Module,
    source: Source,
    tap: Tap,
    fitting: Fitting,
    *,
    learn_share: float,
    seed: int,
    in_order: bool,
) -> None:
    """What `oodmon fit` says of the detectors that it has just fitted.

    What was quick to learn learns once more without a class, and is then shown it. Only where it
    takes seconds: not where nobody knows how long reading the data again takes.
    """
    from oodmon.errors import ContractError
    from oodmon.fitting.advice import advise as find

    more = "`oodmon advise` tries every other detector on the same data, for any --budget"
    if not 0 < source.samples <= _QUICK_SAMPLES:
        click.echo(more)
        return
    try:
        with Bars() as bars:
            advice = find(
                model,
                source,
                tap=tap,
                candidates={},
                learnt={name: fitted.scorer for name, fitted in fitting.detectors.items()},
                again=[
                    name
                    for name, fitted in fitting.detectors.items()
                    if fitted.learn_seconds <= _QUICK_LEARNT
                ],
                learn_share=learn_share,
                seed=seed,
                in_order=in_order,
                held_samples=_QUICK_HELD,
                seconds=_QUICK_SECONDS,
                progress=bars,
            )
    except ContractError as error:
        click.echo(f"no advice: {error}")
        return
    if advice.changes:
        tell(advice, {}, fitted=True)
    click.echo(more)


def tell(advice: Advice, others: dict[str, str], *, fitted: bool = False) -> None:
    """The table, who agrees with whom, and what to run; `fitted`: of what `oodmon fit` learnt."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"{advice.held} held-out samples against changed copies of them (AUROC; 0.5 sees nothing)"
        + (f"; {advice.learnt} others to learn from" if advice.learnt and not fitted else ""),
        soft_wrap=True,
    )
    console.print(_table(advice, console.width))
    if any("class" in change for change in advice.changes):
        console.print(
            "[dim]unseen class: kept from detector and head"
            + (f", which learn again from {advice.learnt} samples" if fitted else "")
            + "; the features know it, so a new class is harder[/]",
            soft_wrap=True,
        )
    reasons: dict[str, list[str]] = {}
    for name, why in {**advice.skipped, **others}.items():
        reasons.setdefault(why.removeprefix(f"{name}: "), []).append(name)
    for why, names in reasons.items():
        told = f"not tried: {', '.join(names)}: {why}"
        console.print(told, markup=False, style="dim", soft_wrap=True)
    if len(advice.proposed) > 1:
        console.print("rank correlation of the proposed:")
        console.print(_agreement(advice))
    console.print(f"the model's pass takes {advice.model_microseconds:.1f} µs per sample")
    if not advice.proposed:
        cheapest = min(advice.verdicts, key=lambda name: advice.verdicts[name].microseconds)
        console.print(
            f"[bold]nothing to propose[/] for {advice.budget_microseconds:.3g} µs per sample: the "
            f"cheapest, {cheapest}, takes {advice.verdicts[cheapest].microseconds:.3g}",
            soft_wrap=True,
        )
        return
    spent = sum(advice.verdicts[name].microseconds for name in advice.proposed)
    console.print(
        f"[bold]• proposed[/] for {advice.budget_microseconds:.3g} µs per sample: "
        f"[bold]{', '.join(advice.proposed)}[/], {spent:.2g} µs together; one of them sees each "
        f"change with a mean AUROC of {advice.coverage:.3f}",
        soft_wrap=True,
    )


def _table(advice: Advice, width: int) -> Any:
    from rich.table import Table

    wide = width >= _WIDE
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in ("", "detector"):
        table.add_column(header, no_wrap=True)
    for header in ("mean", *advice.changes, "µs"):
        # a header may be folded between its words, not within one
        least = max(5 if wide else 4, *map(len, header.split()))
        table.add_column(header, justify="right", overflow="fold", min_width=least)
    if wide:
        table.add_column("most like", no_wrap=True)
    digits = 3 if wide else 2
    for name, verdict in advice.verdicts.items():
        cost = verdict.microseconds
        like = f"{verdict.like} {verdict.likeness:.2f}" if verdict.like else ""
        table.add_row(
            "•" if name in advice.proposed else "",
            name,
            _shown(verdict.mean, digits),
            *(_shown(verdict.auroc[change], digits) for change in advice.changes),
            f"{cost:.2g}" if cost < _TENS else f"{cost:.0f}",
            *([like] if wide else []),
            style="bold" if name in advice.proposed else "",
        )
    return table


def _agreement(advice: Advice) -> Any:
    from rich.table import Table

    table = Table("", *advice.proposed, box=None)
    for name in advice.proposed:
        row = advice.correlation[name]
        table.add_row(name, *(f"{row[other]:.2f}" for other in advice.proposed))
    return table


def _shown(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return f"[dim]{text}[/]" if value < _BLIND else text

"""``oodmon evaluate``: how well the fitted detectors tell named data sets from in-distribution."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.cli.bars import Bars
from oodmon.cli.data import Form, data_options, require_torch, source_of
from oodmon.cli.named import model_of
from oodmon.cli.options import config_argument

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from oodmon.config.schema import Config
    from oodmon.detectors import Scorer
    from oodmon.evaluate import Evaluation
    from oodmon.fitting import Source

    Scores = npt.NDArray[np.float32]

__all__ = ["evaluate"]

_AGAINST: Final = "in-distribution"


@click.command()
@config_argument
@click.argument("data", nargs=-1, metavar="NAME=DATA...")
@click.option(
    "--against",
    metavar="DATA",
    help="In-distribution data; by default the held-out scores of `oodmon fit`.",
)
@data_options
@click.option("--detector", "-d", "only", multiple=True, help="Of the config's, this one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False),
    help="Also write one HTML file with ROC curves and scores.",
)
def evaluate(
    config: str,
    data: tuple[str, ...],
    against: str | None,
    model: str | None,
    transform: str | None,
    batch_size: int,
    device: str,
    image_size: tuple[int, int] | None,
    image_mode: str,
    only: tuple[str, ...],
    as_json: bool,
    output: str | None,
) -> None:
    """Tell how well every fitted detector of CONFIG separates data sets from in-distribution data.

    Each NAME=DATA is a data set that should be told apart, and DATA is what `oodmon fit` takes: a
    function as package.module:name, an .npz file, or a folder of images; labels are not read. They
    are compared with --against, or else with the samples that `oodmon fit` held out.

    \b
      AUROC      chance that an OOD sample scores above an in-distribution one
      AUPR OOD+  average precision with OOD as the positive class
      AUPR ID+   average precision with in-distribution as the positive class
      FPR95 OOD+ share of in-distribution flagged where 95 % of OOD is caught
      FPR95 ID+  share of OOD accepted where 95 % of in-distribution is
    """
    require_torch("evaluating")
    if "=" in config and not Path(config).exists():
        config, data = "oodmon.yaml", (config, *data)  # it was left out
    if not data:
        raise click.UsageError("give at least one NAME=DATA, such as blurred=blurred.npz")
    pairs = _pairs(data)
    from oodmon.config.parse import load

    checked = load(config, "agent")
    form = Form(transform, batch_size, 0, image_size, image_mode, labelled=False)
    own, sources = _sources(pairs, against, form)
    if own is None and model is None:
        raise click.UsageError("no DATA returned a model; name it with --model")
    served = model_of(str(model)) if own is None else own
    if device:
        served = served.to(device)
    with Bars() as bars:
        found = _scores(checked, served, sources, only, bars)
    inside = found.pop(_AGAINST, None) or _held_out(checked, found)
    table, unscored = _table(inside, found)
    if as_json:
        click.echo(json.dumps(_plain(checked, sources, inside, table, unscored), indent=2))
    else:
        _tell(table, unscored, inside, sources)
    if output:
        _page(checked, Path(output), inside, found, table)
        click.echo(f"wrote {output}", err=as_json)


def _pairs(data: Sequence[str]) -> dict[str, str]:
    """Name → DATA; `UsageError` for what is neither, or named twice."""
    pairs: dict[str, str] = {}
    for text in data:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise click.UsageError(
                f"expected NAME=DATA, such as blurred=blurred.npz, found {text!r}"
            )
        if name in pairs or name == _AGAINST:
            raise click.UsageError(f"{name!r} names two data sets")
        pairs[name] = value
    return pairs


def _sources(
    pairs: Mapping[str, str], against: str | None, form: Form
) -> tuple[nn.Module | None, dict[str, Source]]:
    """Every data set, and the model of the first that brings one."""
    own: nn.Module | None = None
    sources = {}
    asked = {_AGAINST: against, **pairs} if against else dict(pairs)
    for name, text in asked.items():
        called = "--against" if name == _AGAINST else name
        made, sources[name] = source_of(str(text), form, called)
        own = own if own is not None else made
    return own, sources


def _scores(
    config: Config,
    model: nn.Module,
    sources: Mapping[str, Source],
    only: Sequence[str],
    bars: Bars,
) -> dict[str, dict[str, Scores]]:
    """Data set → detector → scores."""
    from oodmon.config.build import agent_half, scorers
    from oodmon.fitting.measure import measure
    from oodmon.fitting.reading import place_of

    half = agent_half(config)
    for name in only:
        if name not in half.detectors:
            raise click.UsageError(
                f"--detector: {config.path} has no {name!r}; it has {', '.join(half.detectors)}"
            )
    loaded = scorers(config, str(place_of(model)))
    chosen = {name: loaded[name] for name in (only or loaded)}
    _tell_others(chosen, model)
    return {
        name: measure(
            model,
            source,
            tap=half.tap.component.component,
            scorers=chosen,
            progress=bars,
            stage=name,
        )
        for name, source in sources.items()
    }


def _tell_others(scorers: Mapping[str, Scorer], model: nn.Module) -> None:
    """Say so where the model is not the one that was fitted."""
    from oodmon.taps.identity import WORDS, compare, identify

    weights = identify(model)
    for difference, words in WORDS.items():
        names = [n for n, s in scorers.items() if compare(s.weights, weights) == difference]
        if names:
            click.secho(f"{', '.join(names)}: fitted on {words}", fg="yellow", err=True)


def _held_out(config: Config, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Scores]:
    """The calibrations' scores of the detectors that were run."""
    from oodmon.calibration import Calibration
    from oodmon.config.build import agent_half, calibration_path

    folder = agent_half(config).states
    names = next(iter(found.values()))
    missing = [name for name in names if not calibration_path(folder, name).is_file()]
    if missing:
        raise click.UsageError(
            f"{calibration_path(folder, missing[0])} is not there; give --against DATA"
        )
    return {name: Calibration.load(calibration_path(folder, name)).scores for name in names}


Table = dict[str, dict[str, "Evaluation | None"]]
"""Data set → detector → figures; none where a side has no sample that could be scored."""


def _table(
    inside: Mapping[str, Scores], found: Mapping[str, Mapping[str, Scores]]
) -> tuple[Table, dict[str, dict[str, int]]]:
    """The figures without the rows that a detector cannot score, and how many those were."""
    import numpy as np

    from oodmon.evaluate import evaluate as figures

    table: Table = {}
    unscored: dict[str, dict[str, int]] = {}
    for name, scores in found.items():
        table[name], unscored[name] = {}, {}
        for detector, oods in scores.items():
            ids = inside[detector]
            valid, known = oods[~np.isnan(oods)], ids[~np.isnan(ids)]
            unscored[name][detector] = len(oods) - len(valid)
            both = len(valid) and len(known)
            table[name][detector] = figures(known, valid) if both else None
    return table, unscored


def _plain(
    config: Config,
    sources: Mapping[str, Source],
    inside: Mapping[str, Scores],
    table: Table,
    unscored: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, found in table.items():
        for detector, one in found.items():
            row: dict[str, Any] = {"data": name, "detector": detector}
            row["unscored"] = unscored[name][detector]
            if one is not None:
                row |= {**dataclasses.asdict(one), "fpr95_id": one.fpr95_id}
            rows.append(row)
    return {
        "model": config.model.name,
        "version": config.model.version,
        "against": sources[_AGAINST].told if _AGAINST in sources else "held-out samples of fit",
        "in_distribution": {name: len(scores) for name, scores in inside.items()},
        "results": rows,
    }


def _tell(
    table: Table,
    unscored: Mapping[str, Mapping[str, int]],
    inside: Mapping[str, Scores],
    sources: Mapping[str, Source],
) -> None:
    from rich.console import Console
    from rich.table import Table as Shown

    from oodmon.evaluate import means

    console = Console(highlight=False)
    told = sources[_AGAINST].told if _AGAINST in sources else "samples held out by oodmon fit"
    most = max(len(scores) for scores in inside.values())
    console.print(f"in-distribution: {told} ({most})", markup=False, soft_wrap=True)
    for name, found in table.items():
        console.print(f"{name}: {sources[name].told}", markup=False, soft_wrap=True)
        shown = Shown("detector", box=None)
        for column in ("AUROC", "AUPR OOD+", "AUPR ID+", "FPR95 OOD+", "FPR95 ID+"):
            shown.add_column(column, justify="right")
        shown.add_column("")
        for detector, one in sorted(found.items(), key=lambda pair: _rank(pair[1])):
            lost = unscored[name][detector]
            shown.add_row(
                detector,
                *_cells(one),
                f"{lost} samples not scored" if lost else "",
            )
        console.print(shown)
    if len(table) > 1:
        judged = [f"{name} {mean:.3f}" for name, mean in means(table).items() if mean is not None]
        console.print("mean AUROC: " + ", ".join(judged), markup=False, soft_wrap=True)


def _cells(one: Evaluation | None) -> list[str]:
    if one is None:
        return ["-"] * 5
    figures = (one.auroc, one.aupr_out, one.aupr_in, one.fpr95_ood, one.fpr95_id)
    return [f"{figure:.3f}" for figure in figures]


def _rank(one: Evaluation | None) -> float:
    """Best first; what could not be judged last."""
    return math.inf if one is None else -one.auroc


def _page(
    config: Config,
    path: Path,
    inside: Mapping[str, Scores],
    found: Mapping[str, Mapping[str, Scores]],
    table: Table,
) -> None:
    try:
        from oodmon.report.evaluated import write
    except ImportError as error:
        raise click.UsageError(
            f"the page needs plots: pip install 'oodmon[report]' ({error})"
        ) from None
    write(path, config.model.name, config.model.version, inside, found, table)

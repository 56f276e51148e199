"""``oodmon fit``: learn states and calibrations from reference data."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from oodmon.cli.advise import after_fit
from oodmon.cli.bars import Bars
from oodmon.cli.data import Form, data_options, model_and_source, require_torch
from oodmon.cli.options import config_argument
from oodmon.cli.promised import promise

if TYPE_CHECKING:
    from torch import nn

    from oodmon.config.schema import AgentSection, ModelSection
    from oodmon.contexts import Context
    from oodmon.fitting import Fitting

__all__ = ["fit"]

_UNSCORED: Final = 0.01
"""Share of samples without a score that is told of: reference data should have none."""


@click.command()
@config_argument
@click.argument("data")
@data_options
@click.option("--learn-share", default=0.5, show_default=True, help="The rest calibrates.")
@click.option("--seed", default=0, show_default=True, help="Of the split and of the detectors.")
@click.option("--in-order", is_flag=True, help="DATA is in the order as served.")
@click.option(
    "--window-samples",
    default=256,
    show_default=True,
    type=click.IntRange(8, 100_000),
    help="In a window, about: what thresholds of drift tests are found with.",
)
@click.option("--advice/--no-advice", default=True, help="Tell what each detector reacts to.")
def fit(
    config: str,
    data: str,
    model: str | None,
    transform: str | None,
    learn_share: float,
    seed: int,
    batch_size: int,
    device: str,
    in_order: bool,
    window_samples: int,
    advice: bool,
    image_size: tuple[int, int] | None,
    image_mode: str,
) -> None:
    """Learn what every detector of CONFIG needs from DATA, and calibrate it.

    DATA holds in-distribution samples as the model meets them in service, and is one of

    \b
      package.module:function  called without arguments; returns (model, data) or data, where data
                               is a pair of arrays (inputs, labels), a Dataset, a DataLoader, or
                               any re-iterable of such batches; labels may be None, and a third
                               part {"times": …, "segments": …} may say when and where
      file.npz                 arrays `inputs` (used as they are) or `images` (bytes become
                               [0, 1], channels first), and `labels`; needs --model. Arrays
                               `times` and `segments` say when and where samples were seen
      folder/                  one sub-folder of images per class; needs --model and Pillow

    Samples with the label -1 are known outliers: detectors that can (deep_sad, introspection,
    pixelcnn, language_model) learn from them, all others never see them.

    One share of the samples is learnt from, the other, disjoint one is what raw scores are ranked
    against. Both files of each detector go to the config's `states` folder, and so do the
    thresholds of drift tests with `false_alarms`. Those are for independent samples unless DATA is
    --in-order: then neighbours stay together, and thresholds allow for how alike they are.

    At the end it tells what each detector reacts to (corruptions of the held-out samples, a class
    that was kept from it), how alike detectors are, what they cost, and which to run together;
    `oodmon advise` compares them with all others.
    """
    if not 0.0 < learn_share < 1.0:
        raise click.BadParameter(f"{learn_share} is not in (0, 1)", param_hint="--learn-share")
    require_torch("fitting")
    from oodmon.config.build import agent_half
    from oodmon.config.parse import load
    from oodmon.fitting import fit as learn

    checked = load(config, "agent")
    half = agent_half(checked)
    _keep_others(half, checked.model.name)
    form = Form(transform, batch_size, seed, image_size, image_mode)
    found, source = model_and_source(data, model, form)
    click.echo(f"reference: {source.told}")
    _tell_replaced(half, checked.model, found)
    with Bars() as bars:
        fitting = learn(
            found,
            source,
            tap=half.tap.component.component,
            detectors={name: entity.component for name, entity in half.detectors.items()},
            model_name=checked.model.name,
            version=checked.model.version,
            learn_share=learn_share,
            seed=seed,
            device=device,
            in_order=in_order,
            progress=bars,
            context=_context(config),
        )
    folder = _write(fitting, half.states)
    _tell(fitting, folder)
    promise(config, fitting, window_samples, in_order=in_order, seed=seed)
    if advice:
        after_fit(
            found,
            source,
            half.tap.component.component,
            fitting,
            learn_share=learn_share,
            seed=seed,
            in_order=in_order,
        )


def _context(path: str) -> Context:
    """What the daemon will rank within, as far as its half of the config is here."""
    from oodmon.config.parse import load
    from oodmon.contexts import Context
    from oodmon.errors import ConfigError

    try:
        daemon = load(path, "daemon").daemon
    except ConfigError:
        return Context()
    return Context() if daemon is None else daemon.calibration.ranked_within


def _keep_others(half: AgentSection, model: str) -> None:
    """`UsageError` where the folder holds what was learnt for another model."""
    from oodmon.config.build import state_path
    from oodmon.detectors.scorer import made_for
    from oodmon.errors import StateError

    for name in half.detectors:
        path = state_path(half.states, name)
        with suppress(StateError):  # damaged: nothing is lost with it
            other = made_for(path)[0] if path.is_file() else ""
            if other not in ("", model):
                raise click.UsageError(
                    f"{path} was learnt for model {other!r}, this config is of {model!r}: give it "
                    f"a folder of its own (`agent.states`), or delete {path.parent}"
                )


def _tell_replaced(half: AgentSection, served: ModelSection, model: nn.Module) -> None:
    """Say so where the states that are replaced are of other weights under the same version."""
    from oodmon.config.build import state_path
    from oodmon.detectors.scorer import made_for
    from oodmon.errors import StateError
    from oodmon.taps.identity import compare, identify

    weights = identify(model)
    others = []
    for name in half.detectors:
        path = state_path(half.states, name)
        with suppress(StateError):
            _, version, known = made_for(path) if path.is_file() else ("", "", "")
            if version == served.version and compare(known, weights) in ("values", "layout"):
                others.append(name)
    if others:
        click.secho(
            f"{half.states}: {', '.join(others)}: fitted on other weights, also of "
            f"{served.name!r} version {served.version!r}: they are replaced. Scores by the old "
            "states will not be counted by a daemon with the new calibrations; another "
            "`model.version` keeps such models apart",
            fg="yellow",
            err=True,
        )


def _write(fitting: Fitting, states: str) -> Path:
    """Both files of each detector; each is replaced whole, and their digests tell a mixture."""
    from oodmon.config.build import calibration_path, state_path

    folder = Path(states)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, fitted in fitting.detectors.items():
        fitted.scorer.save(state_path(states, name))
        fitted.calibration.save(calibration_path(states, name))
    return folder


def _tell(fitting: Fitting, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for line in fitting.found:
        console.print(f"tap: {line}", markup=False)
    if not math.isnan(fitting.accuracy):
        console.print(f"model: accuracy {fitting.accuracy:.3f} on the labelled samples")
        if fitting.accuracy <= fitting.commonest:
            click.secho(
                f"that is no better than guessing ({fitting.commonest:.3f}): are the inputs "
                "prepared as in service, and the labels the numbers of the model's classes?",
                fg="yellow",
                err=True,
            )
    table = Table("detector", "digest", "calibration", "learnt in", "scores", "reads", box=None)
    table.columns[1].no_wrap = True
    for name, fitted in fitting.detectors.items():
        reads = fitted.scorer.reads()
        what = [*reads.layers, *(["logits"] if reads.logits else [])]
        samples = len(fitted.calibration.scores)
        each = 1e6 * fitted.score_seconds / max(samples, 1)
        left_out = f" ({fitted.invalid} not scored)" if fitted.invalid else ""
        table.add_row(
            name,
            fitted.scorer.digest,
            f"{samples}{left_out}",
            f"{fitted.learn_seconds:.2f} s",
            f"{each:.0f} µs each",
            ", ".join(
                [*what, *(["inputs"] if reads.inputs else []), *(["model"] if reads.model else [])]
            ),
        )
    console.print(table)
    unscored = max(
        f.invalid / max(f.invalid + len(f.calibration.scores), 1)
        for f in fitting.detectors.values()
    )
    if unscored > _UNSCORED:
        click.secho(
            f"{unscored:.0%} of the held-out samples could not be scored: does the data hold "
            "values that are not numbers?",
            fg="yellow",
            err=True,
        )
    known = f" and {fitting.outliers} known outliers" if fitting.outliers else ""
    console.print(
        f"learnt from {fitting.learnt} samples{known}, calibrated with {fitting.calibrated} "
        f"others; written to {folder}",
        markup=False,
        soft_wrap=True,
    )

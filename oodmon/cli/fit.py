"""``oodmon fit``: learn states and calibrations from reference data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from oodmon.cli.named import is_named, model_of, named
from oodmon.cli.options import config_argument
from oodmon.cli.promised import promise

if TYPE_CHECKING:
    import torch

    from oodmon.fitting import Fitting, Source

__all__ = ["fit"]


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    del context, parameter
    if value is None:
        return None
    height, _, width = value.partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height)):
        raise click.BadParameter("expected HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width or height)


@click.command()
@config_argument
@click.argument("data")
@click.option("--model", help="The model, as package.module:name (a model, or makes one).")
@click.option("--transform", help="Applied to each image or row, as package.module:name.")
@click.option("--learn-share", default=0.5, show_default=True, help="The rest calibrates.")
@click.option("--seed", default=0, show_default=True, help="Of the split and of the detectors.")
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1))
@click.option("--device", default="", help="Such as cuda; by default where the model is.")
@click.option("--in-order", is_flag=True, help="DATA is in the order as served.")
@click.option(
    "--window-samples",
    default=256,
    show_default=True,
    type=click.IntRange(8, 100_000),
    help="In a window, about: what thresholds of drift tests are found with.",
)
@click.option("--image-size", callback=_size, help="Resize images of a folder, HEIGHTxWIDTH.")
@click.option("--image-mode", default="RGB", type=click.Choice(["RGB", "L"]), show_default=True)
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
    image_size: tuple[int, int] | None,
    image_mode: str,
) -> None:
    """Learn what every detector of CONFIG needs from DATA, and calibrate it.

    DATA holds in-distribution samples as the model meets them in service, and is one of

    \b
      package.module:function  called without arguments; returns (model, data) or data, where data
                               is a pair of arrays (inputs, labels), a Dataset, a DataLoader, or
                               any re-iterable of such batches; labels may be None
      file.npz                 arrays `inputs` (used as they are) or `images` (bytes become
                               [0, 1], channels first), and `labels`; needs --model
      folder/                  one sub-folder of images per class; needs --model and Pillow

    One share of the samples is learnt from, the other, disjoint one is what raw scores are ranked
    against. Both files of each detector go to the config's `states` folder, and so do the
    thresholds of drift tests with `false_alarms`. Those are for independent samples unless DATA is
    --in-order: then neighbours stay together, and thresholds allow for how alike they are.
    """
    if not 0.0 < learn_share < 1.0:
        raise click.BadParameter(f"{learn_share} is not in (0, 1)", param_hint="--learn-share")
    try:
        import torch  # noqa: F401  # tells early, and in plain words, what is missing
    except ImportError:
        raise click.UsageError("fitting needs torch: pip install 'oodmon[torch]'") from None
    from oodmon.config.build import agent_half
    from oodmon.config.parse import load
    from oodmon.fitting import fit as learn

    checked = load(config, "agent")
    half = agent_half(checked)
    found, source = _source(
        data, model, transform, batch_size, seed, image_size=image_size, image_mode=image_mode
    )
    click.echo(f"reference: {source.told}")
    with _Bars() as bars:
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
        )
    folder = _write(fitting, half.states)
    _tell(fitting, folder)
    promise(config, fitting, window_samples, in_order=in_order, seed=seed)


def _source(
    data: str,
    model: str | None,
    transform: str | None,
    batch_size: int,
    seed: int,
    *,
    image_size: tuple[int, int] | None,
    image_mode: str,
) -> tuple[torch.nn.Module, Source]:
    from torch import nn

    from oodmon.fitting import sources

    change = named(transform, "--transform") if transform else None
    path = Path(data)
    if is_named(data) and not path.exists():
        if change is not None:
            raise click.UsageError("--transform is for files and folders; do it in the function")
        made = named(data, "DATA")
        made = made() if callable(made) and not hasattr(made, "__getitem__") else made
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
            own, made = made
            return own, sources.from_data(made, batch_size=batch_size, seed=seed)
        if model is None:
            raise click.UsageError("DATA returned no model; name it with --model")
        source = sources.from_data(made, batch_size=batch_size, seed=seed)
    elif model is None:
        raise click.UsageError("--model is needed with a file or a folder")
    elif path.is_dir():
        source = sources.from_images(
            path,
            batch_size=batch_size,
            seed=seed,
            size=image_size,
            mode=image_mode,
            transform=change,
        )
    elif path.suffix == ".npz" and path.exists():
        source = sources.from_npz(path, batch_size=batch_size, seed=seed, transform=change)
    else:
        raise click.UsageError(
            f"DATA: {data!r} is neither package.module:function, an .npz file, nor a folder"
        )
    return model_of(model), source


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
    console.print(
        f"learnt from {fitting.learnt} samples, calibrated with {fitting.calibrated} others; "
        f"written to {folder}",
        markup=False,
        soft_wrap=True,
    )


class _Bars:
    """One progress bar per stage, on standard error."""

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
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0, note="")
        self._progress.update(self._tasks[stage], completed=done, note=note)

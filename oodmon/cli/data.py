"""Data sets on the command line: a function, an ``.npz`` file or a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from oodmon.cli.named import is_named, made_by, model_of, named

if TYPE_CHECKING:
    from torch import nn

    from oodmon.fitting import Source

__all__ = ["Form", "data_options", "model_and_source", "require_torch", "source_of"]


@dataclass(frozen=True, slots=True)
class Form:
    """How data sets are read, as the options say."""

    transform: str | None
    batch_size: int
    seed: int
    image_size: tuple[int, int] | None
    image_mode: str
    labelled: bool = True


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    del context, parameter
    if value is None:
        return None
    height, _, width = value.partition("x")
    if not (height.isdigit() and (width or height).isdigit() and int(height)):
        raise click.BadParameter("expected HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width or height)


_OPTIONS = (
    click.option("--model", help="The model, as package.module:name (a model, or makes one)."),
    click.option("--transform", help="Applied to each image or row, as package.module:name."),
    click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1)),
    click.option("--device", default="", help="Such as cuda; by default where the model is."),
    click.option("--image-size", callback=_size, help="Resize images of a folder, HEIGHTxWIDTH."),
    click.option("--image-mode", default="RGB", type=click.Choice(["RGB", "L"]), show_default=True),
)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that reads data sets through the model."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def require_torch(what: str) -> None:
    """Tell early, and in plain words, what is missing."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise click.UsageError(f"{what} needs torch: pip install 'oodmon[torch]'") from None


def source_of(data: str, form: Form, called: str = "DATA") -> tuple[nn.Module | None, Source]:
    """The data set of this name, and the model if its function returned one.

    `UsageError` says under the name `called` what the text is not.
    """
    from torch import nn

    from oodmon.fitting import sources

    change = named(form.transform, "--transform") if form.transform else None
    path = Path(data)
    if is_named(data) and not path.exists():
        if change is not None:
            raise click.UsageError("--transform is for files and folders; do it in the function")
        made = named(data, called)
        if callable(made) and not hasattr(made, "__getitem__"):
            made = made_by(made, data, called)
        own = None
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
            own, made = made
        return own, sources.from_data(made, batch_size=form.batch_size, seed=form.seed)
    if path.is_dir():
        return None, sources.from_images(
            path,
            batch_size=form.batch_size,
            seed=form.seed,
            size=form.image_size,
            mode=form.image_mode,
            transform=change,
            labelled=form.labelled,
        )
    if path.suffix == ".npz" and path.exists():
        return None, sources.from_npz(
            path,
            batch_size=form.batch_size,
            seed=form.seed,
            transform=change,
            labelled=form.labelled,
        )
    if not path.exists() and (path.suffix == ".npz" or data.endswith("/")):
        raise click.UsageError(f"{called}: there is no {data}")
    raise click.UsageError(
        f"{called}: {data!r} is neither package.module:function, an .npz file, nor a folder"
    )


def model_and_source(data: str, model: str | None, form: Form) -> tuple[nn.Module, Source]:
    """The model that a function returned beside its data, else the one of `--model`."""
    if model is None and not is_named(data):
        raise click.UsageError("--model is needed with a file or a folder")
    own, source = source_of(data, form)
    if own is None and model is None:
        raise click.UsageError("DATA returned no model; name it with --model")
    return model_of(str(model)) if own is None else own, source

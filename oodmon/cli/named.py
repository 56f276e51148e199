"""Things of the user's own code, named on the command line as ``package.module:name``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from oodmon.registry import near

if TYPE_CHECKING:
    import torch

__all__ = ["is_named", "made_by", "model_of", "named"]

_NAMED: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_named(text: str) -> bool:
    """Whether a text has the form of an import path."""
    return _NAMED.fullmatch(text) is not None


def named(text: str, option: str) -> Any:
    """The object of this import path; modules of the current folder can be named too."""
    if not is_named(text):
        raise click.UsageError(f"{option}: expected package.module:name, found {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise click.UsageError(f"{option}: there is no module {error.name!r}") from None
        raise click.UsageError(f"{option}: importing {module_name} failed: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise click.UsageError(
            f"{option}: importing {module_name} failed: {kind}: {error}"
        ) from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            hint = near(part, dir(found))
            raise click.UsageError(f"{option}: {module_name} has no {path!r}{hint}") from None
    return found


def made_by(function: Callable[[], Any], text: str, option: str) -> Any:
    """What a function of the user's own returns; what it raises is told as its failure."""
    try:
        return function()
    except Exception as error:
        kind = type(error).__name__
        raise click.UsageError(
            f"{option}: {text} raised {kind}: {error} (`oodmon --debug …` shows where)"
        ) from error


def model_of(text: str, option: str = "--model") -> torch.nn.Module:
    """A model, or what a function (or class) without arguments makes."""
    import torch

    found = named(text, option)
    if not isinstance(found, torch.nn.Module) and callable(found):
        found = made_by(found, text, option)
    if not isinstance(found, torch.nn.Module):
        kind = type(found).__name__
        raise click.UsageError(f"{option}: expected a torch.nn.Module, found {kind}")
    return found

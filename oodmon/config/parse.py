"""A config file → `Config`, or every problem of it at once.

The only module that reads the environment.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from oodmon.config.convert import Converter
from oodmon.config.document import Problems, compose
from oodmon.config.schema import Config
from oodmon.config.sections import Half, Sections
from oodmon.errors import ConfigError

__all__ = ["Half", "load", "loads"]


def load(
    path: str | os.PathLike[str],
    half: Half = "both",
    *,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The config in a file; `ConfigError` with every problem in file order.

    Args:
        path: the YAML file.
        half: which half the caller needs. Only that half is checked and built (the detectors of
            the agent half import torch, which the daemon must not); it must be in the file.
            "both" takes the halves that are there, at least one.
        environment: what ``${NAME}`` stands for; the process's own by default.
    """
    name = os.fspath(path)
    try:
        data = Path(name).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError([f"{name}:1:1: cannot be read: {why}"]) from None
    return loads(data, half, file=name, environment=environment)


def loads(
    data: bytes,
    half: Half = "both",
    *,
    file: str = "oodmon.yaml",
    environment: Mapping[str, str] | None = None,
) -> Config:
    """The config in these bytes; relative paths are relative to the folder of `file`."""
    problems = Problems(file)
    root = compose(data, problems)
    config = None
    if root is not None:
        folder = Path(file).absolute().parent
        converter = Converter(problems, os.environ if environment is None else environment, folder)
        config = Sections(converter, half, file, hashlib.sha256(data).hexdigest()[:16]).config(root)
    if config is None or len(problems):
        raise ConfigError(problems.lines())
    return config

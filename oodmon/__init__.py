"""oodmon watches a deployed model: out-of-distribution scores, drift, alerts, retraining triggers.

The public names are below. Importing the package imports neither torch nor any client library.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import os

    import torch

    from oodmon.agent import Agent, request
    from oodmon.agent.request import Ask
    from oodmon.config.parse import load
    from oodmon.config.schema import Config
    from oodmon.records import Activations, ScoreBatch

__all__ = [
    "Activations",
    "Agent",
    "Config",
    "ScoreBatch",
    "__version__",
    "attach",
    "load",
    "request",
]

__version__ = "0.1.0"

# The agent imports torch, which the daemon must not; the rest waits so that `oodmon --help` is
# quick.
_HOMES: Final[Mapping[str, str]] = {
    "Activations": "oodmon.records",
    "Agent": "oodmon.agent",
    "Config": "oodmon.config.schema",
    "ScoreBatch": "oodmon.records",
    "load": "oodmon.config.parse",
    "request": "oodmon.agent",
}


def attach(
    model: torch.nn.Module,
    config: str | os.PathLike[str] | Config,
    *,
    request: Ask | None = None,
    source: str = "",
) -> Agent:
    """Watch a served model from now on: the one line in the serving process.

    Args:
        model: what is served; its outputs stay as they are, bit for bit.
        config: the YAML file (or what `load` made of it), whose `agent` half says what to do.
        request: asked in each sampled pass for the ids and segments of its samples; by default
            the context manager `oodmon.request` says them.
        source: id of this agent; "" makes one from host, process and chance.

    Returns:
        The agent; ``detach()`` ends the watch.

    Raises:
        ConfigError: the file has problems, all of them told.
        StateError: a detector of the config has not been fitted (`oodmon fit`), or otherwise.
        ContractError: the model has no layer that a detector reads.
    """
    from oodmon.agent import Agent
    from oodmon.config import build
    from oodmon.config.parse import load as read
    from oodmon.config.schema import Config

    checked = config if isinstance(config, Config) else read(config, "agent")
    half = build.agent_half(checked)
    return Agent.attach(
        model,
        tap=half.tap.component.component,
        scorers=build.scorers(checked),
        feed=half.feed.component,
        model_name=checked.model.name,
        version=checked.model.version,
        overhead_budget=half.tap.overhead_budget,
        shadow_budget=half.tap.shadow_budget,
        check_weights=half.check_weights,
        request=request,
        source=source,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

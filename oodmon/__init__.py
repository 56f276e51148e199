"""oodmon watches a deployed model: out-of-distribution scores, drift, alerts, retraining triggers.

The public names are below. Importing the package imports neither torch nor any client library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oodmon.records import Activations, ScoreBatch

if TYPE_CHECKING:
    from oodmon.agent import Agent, attach

__all__ = ["Activations", "Agent", "ScoreBatch", "__version__", "attach"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The agent imports torch, which the daemon must not.
    if name in ("Agent", "attach"):
        from oodmon import agent

        return getattr(agent, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

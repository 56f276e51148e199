"""Everything that oodmon raises on purpose, one tree:

OodmonError
├── ContractError          a value or a component breaks what records.py or contracts.py promise
├── RegistryError          a name cannot become a class
│   ├── UnknownName        nobody registered it; near names are suggested
│   ├── NameTaken          two owners claim it
│   └── BrokenPlugin       it exists, but importing it failed
├── ConfigError            the YAML file holds problems; all of them at once
├── StateError             what a scorer or a calibration learnt cannot be used here
├── WireError              bytes that are no record
│   └── NewerSchema        a record, but one that only a newer release can read
├── FeedError              the way from agent to daemon is unusable
├── StoreError             the database is unusable
│   └── Superseded         another daemon has taken over this pipeline
├── RetryLater             a sink or trigger failed, and the same call may work later
└── Rejected               a sink or trigger failed, and the same call will fail again
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BrokenPlugin",
    "ConfigError",
    "ContractError",
    "FeedError",
    "NameTaken",
    "NewerSchema",
    "OodmonError",
    "RegistryError",
    "Rejected",
    "RetryLater",
    "StateError",
    "StoreError",
    "Superseded",
    "UnknownName",
    "WireError",
]


class OodmonError(Exception):
    """Base of every error that oodmon raises on purpose."""


class ContractError(OodmonError):
    """A value or component breaks its contract; the message says what, where, what was expected."""


class RegistryError(OodmonError):
    """A name cannot become a class."""


class UnknownName(RegistryError):
    """No component of this kind has the name."""


class NameTaken(RegistryError):
    """Two components claim one name; both owners are in the message."""


class BrokenPlugin(RegistryError):
    """The component exists, but its module could not be imported."""


class ConfigError(OodmonError):
    """The configuration holds problems: each is one line ``file:line:column: path: what``."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class StateError(OodmonError):
    """A scorer's or calibration's state is missing, damaged, or was made for something else."""


class WireError(OodmonError):
    """Bytes that do not decode to a record of a version that this release knows."""


class NewerSchema(WireError):
    """A whole record, written by a newer release; the message says which one to install."""


class FeedError(OodmonError):
    """A feed cannot be opened, read or written."""


class StoreError(OodmonError):
    """The database cannot be opened, migrated, read or written.

    Args:
        why: what failed, where; never with a password.
        retryable: whether the same call may work later (server gone, disk full, lock held).
    """

    def __init__(self, why: str, retryable: bool = False) -> None:
        super().__init__(why)
        self.retryable = retryable


class Superseded(StoreError):
    """Another daemon has taken over this pipeline: nothing was written, and nothing may be."""


class RetryLater(OodmonError):
    """The receiver could not take it now.

    Args:
        why: one sentence for the log and for the outbox row.
        after_seconds: the receiver's own wish (``Retry-After``); 0 leaves it to the backoff.
    """

    def __init__(self, why: str, after_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.after_seconds = after_seconds


class Rejected(OodmonError):
    """The receiver will never take this; it goes to the dead letters."""

"""A retraining request by signed HTTP POST, for CI systems and schedulers that take webhooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oodmon.registry import triggers
from oodmon.secret import Secret
from oodmon.triggers import Requesting

__all__ = ["Webhook"]


@triggers.register("webhook")
@dataclass(frozen=True)
class Webhook(Requesting):
    """POST a CloudEvent `oodmon.retraining.requested.v1`; its id is in ``Idempotency-Key``.

    Signature, redirects, retries and failures are those of the `webhook` sink.

    Options:
        url: ``https://…`` (or ``http://…``).
        secret: signs the request; empty sends it unsigned.
        token: sent as ``Authorization: Bearer``; empty sends none.
        timeout_seconds: for the whole request.
        ca_file: PEM file of certification authorities instead of the system's.
    """

    url: str
    secret: Secret = field(default_factory=Secret)
    token: Secret = field(default_factory=Secret)
    timeout_seconds: float = 10.0
    ca_file: str = ""

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Options for the conformity checks."""
        signed = {"url": "http://{address}/hook", "secret": Secret("s"), "token": Secret("t")}
        return [{**signed, "timeout_seconds": 0.5}]

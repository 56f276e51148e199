"""Who may post to the daemon's HTTP intake, and how much: its options, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from oodmon.errors import ContractError
from oodmon.secret import Secret

__all__ = ["Admission"]

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_PORTS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Admission:
    """`daemon.intake`: where scores and outputs may be posted.

    Args:
        host, port: where it listens; 0 takes a free port.
        token: what a client sends as ``Authorization: Bearer``.
        certificate_file, key_file: PEM files, for TLS.
        client_ca_file: PEM file; a client must show a certificate of this authority.
        without_login: let in whoever reaches the port. Only on a loopback address, for a proxy on
            the same machine that asks for the login.
        max_body_bytes: of one request.
        max_requests: at a time; more are answered 503.
        requests_per_second: on average, with bursts of as many; more are answered 429.
        queue_requests: outputs that may wait for being scored; more are answered 429.
        score_timeout_seconds: for scoring one request.
        states_folder: what `oodmon fit` wrote, to score raw outputs; "" takes score batches only.
        detectors: ids to score with; none takes all there that read logits only.
        output: name of the output tensor that holds the logits; "" takes the only one that can.
    """

    host: str = "127.0.0.1"
    port: int = 9465
    token: Secret = field(default_factory=Secret)
    certificate_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    without_login: bool = False
    max_body_bytes: int = 4 << 20
    max_requests: int = 16
    requests_per_second: float = 200.0
    queue_requests: int = 64
    score_timeout_seconds: float = 10.0
    states_folder: str = ""
    detectors: tuple[str, ...] = ()
    output: str = ""

    def __post_init__(self) -> None:
        local = self.host in _LOOPBACK
        problem = ""
        if not 0 <= self.port < _PORTS:
            problem = f"port: {self.port} is not in [0, {_PORTS - 1}]"
        elif bool(self.certificate_file) != bool(self.key_file):
            problem = "key_file: certificate_file and key_file go together"
        elif self.client_ca_file and not self.certificate_file:
            problem = "client_ca_file: needs certificate_file, for TLS"
        elif self.without_login and not local:
            problem = "without_login: is only for a loopback host"
        elif not (self.token or self.client_ca_file or self.without_login):
            problem = "token: is required, or client_ca_file; else anyone could write scores"
        elif not local and not self.certificate_file:
            problem = "certificate_file: is required where host is not a loopback address"
        for name, least in (
            ("max_body_bytes", 1024), ("max_requests", 1), ("queue_requests", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                problem = problem or f"{name}: expected at least {least}"
        for name in ("requests_per_second", "score_timeout_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                problem = problem or f"{name}: {value} is not positive"
        if problem:
            raise ContractError(problem)

"""How Kafka brokers are reached: addresses, TLS, logins; for feed, sink and trigger alike.

No client is imported here; `Access.settings` gives what its constructor takes.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from oodmon.errors import FeedError
from oodmon.secret import Secret

__all__ = [
    "Access",
    "address",
    "built",
    "choice",
    "consumer",
    "is_refusal",
    "knock",
    "login",
    "reach",
    "reader_problem",
    "reading",
]

_T = TypeVar("_T")

_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS: Final = ("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_FILES: Final = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
_DEFAULT_PORT: Final = 9092
_LEAST_KNOCK_SECONDS: Final = 0.05
_VERDICT_SECONDS: Final = 0.1  # a broker speaks only when spoken to, or to refuse


@dataclass(frozen=True, kw_only=True)
class Access:
    """Options for reaching brokers.

    Args:
        client_id: how the brokers' logs name this client.
        api_version: such as ``2.3`` for brokers that cannot be asked; empty asks.
        security_protocol: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
        sasl_mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512, with `username` and `password`.
        ssl_cafile, ssl_certfile, ssl_keyfile, ssl_password: PEM files, for TLS and mutual TLS.
    """

    client_id: str = "oodmon"
    api_version: str = ""
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = ""
    username: str = ""
    password: Secret = field(default_factory=Secret)
    ssl_cafile: str = ""
    ssl_certfile: str = ""
    ssl_keyfile: str = ""
    ssl_password: Secret = field(default_factory=Secret)

    def access_problem(self) -> str:
        """What cannot be meant, in words that begin with the option's name; "" where all can."""
        for name, known in (("security_protocol", _PROTOCOLS), ("sasl_mechanism", _MECHANISMS)):
            if why := choice(name, getattr(self, name), known):
                return why
        if self.api_version and not all(p.isdigit() for p in self.api_version.split(".")):
            return f"api_version: expected numbers such as 2.3, found {self.api_version!r}"
        encrypted = self.security_protocol.endswith("SSL")
        for name in _FILES:
            if getattr(self, name) and not encrypted:
                # Whoever names certificates means TLS: plain text would be a silent hole.
                return f"{name}: is only used with security_protocol SSL or SASL_SSL"
        if self.ssl_keyfile and not self.ssl_certfile:
            return "ssl_keyfile: needs ssl_certfile, whose key it is"
        if bool(self.username) and not self.security_protocol.startswith("SASL"):
            return "username: is only used with security_protocol SASL_SSL or SASL_PLAINTEXT"
        return ""

    def missing_file(self) -> str:
        """A certificate file that is not there, in words; "" where all are."""
        for name in _FILES:
            file = getattr(self, name)
            if file and not Path(file).is_file():
                return f"{name}: there is no file {file!r}"
        return ""

    def settings(self) -> dict[str, Any]:
        """What the client's constructor takes. Holds the password: never show it."""
        settings: dict[str, Any] = {
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
        }
        if self.api_version:
            settings["api_version"] = tuple(int(part) for part in self.api_version.split("."))
        if self.security_protocol.startswith("SASL"):
            settings["sasl_mechanism"] = self.sasl_mechanism or "PLAIN"
            settings["sasl_plain_username"] = self.username
            settings["sasl_plain_password"] = self.password.reveal()
        for name in _FILES:
            settings[name] = getattr(self, name) or None
        settings["ssl_password"] = self.ssl_password.reveal() or None
        return settings

    def tls(self) -> ssl.SSLContext | None:
        """The context that the client will use as well; none without TLS."""
        if not self.security_protocol.endswith("SSL"):
            return None
        context = ssl.create_default_context(cafile=self.ssl_cafile or None)
        if self.ssl_certfile:
            password = self.ssl_password.reveal() or None
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile or None, password)
        return context


def choice(name: str, value: str, known: Sequence[str]) -> str:
    """What to say where `value` is none of `known`, else ""."""
    if value in known:
        return ""
    expected = ", ".join(one or "empty" for one in known)
    return f"{name} is {value!r}; expected one of: {expected}"


def reader_problem(servers: Sequence[str], topic: str, group: str, timeout_seconds: float) -> str:
    """What a reader of a topic cannot be told, as `Access.access_problem` says it; else ""."""
    if not servers:
        return "bootstrap_servers: names no broker"
    try:
        for server in servers:
            address(server)
    except ValueError as error:
        return str(error)
    if not _TOPIC.fullmatch(topic):
        return f"topic: {topic[:64]!r} is no name of a topic"
    if not group:
        return "group: expected a name, found none"
    if not timeout_seconds > 0:
        return f"timeout_seconds: {timeout_seconds} is not positive"
    return ""


def reading(what: str, work: Callable[[], _T], drop: Callable[[], None]) -> _T:
    """Do it; after a failure drop the connection, so that the next call begins with a new one.

    Args:
        what: is read, for the message.
        work: with the client library.
        drop: ends the connection.

    Raises:
        FeedError: it failed, or the client library is not installed.
    """
    try:
        from kafka.errors import KafkaError  # type: ignore[import-untyped]
    except ImportError as error:
        raise FeedError("kafka: the client is missing; pip install 'oodmon[kafka]'") from error
    try:
        return work()
    except (KafkaError, OSError, ValueError) as error:
        drop()
        raise FeedError(f"{what}: {error}") from error


def reach(access: Access, servers: Sequence[str], timeout_seconds: float) -> None:
    """Return when a broker answers and, where there is one, accepts our login.

    Raises:
        ConnectionError, ValueError, OSError: as `knock` and `login`; a certificate file is missing.
    """
    if missing := access.missing_file():
        raise ValueError(missing)
    knock(access, servers, timeout_seconds)
    if access.security_protocol.startswith("SASL"):
        login(access, servers, timeout_seconds)


def knock(access: Access, servers: Sequence[str], timeout_seconds: float) -> None:
    """Return when one broker opens its door.

    The client retries silently until its timeout; a knock fails at once and knows why. With TLS it
    shakes hands, so that a certificate that is not trusted is told as such.

    Raises:
        ConnectionError: nobody does; `is_refusal` tells whether for lack of trust.
        ValueError, OSError: an address that is none; own certificate files that cannot be read.
    """
    context = access.tls()
    deadline = time.monotonic() + timeout_seconds
    last: tuple[str, Exception] | None = None
    for number, server in enumerate(servers):
        host, port = address(server)
        left = max((deadline - time.monotonic()) / (len(servers) - number), _LEAST_KNOCK_SECONDS)
        try:
            with socket.create_connection((host, port), left) as plain:
                if context is not None:
                    _greet(plain, host, context)
        except (OSError, UnicodeError) as error:
            last = server, error
        else:
            return
    if last is not None:
        raise ConnectionError(f"{last[0]}: {last[1]}") from last[1]


def _greet(plain: socket.socket, host: str, context: ssl.SSLContext) -> None:
    with context.wrap_socket(plain, server_hostname=host) as encrypted:
        # In TLS 1.3 the server judges our certificate after we think that we are done.
        encrypted.settimeout(_VERDICT_SECONDS)
        try:
            encrypted.recv(1)
        except TimeoutError:
            return


def address(server: str) -> tuple[str, int]:
    """Host and port of ``host:port``, ``host`` or ``[IPv6]:port``, or `ValueError`."""
    host, colon, port = server.rpartition(":")
    if not colon or host.endswith(":"):  # no port, or a bare IPv6 address
        return server, _DEFAULT_PORT
    if not port.isdigit():
        raise ValueError(f"bootstrap_servers: {server!r} is not host:port")
    return host.strip("[]"), int(port)


def built(kind: Callable[..., Any], /, **settings: Any) -> Any:
    """A producer or a consumer of the client library; one that cannot be built leaves nothing open.

    The library starts a thread and connections before it asks a broker for its version, and leaves
    them running where it gets no answer: some at every try while a broker is away.
    """
    clients: list[Any] = []

    def build(**given: Any) -> Any:
        from kafka.net.compat import KafkaNetClient  # type: ignore[import-untyped]

        clients.append(KafkaNetClient(**given))
        return clients[-1]

    try:
        return kind(kafka_client=build, **settings)
    except BaseException:
        for client in clients:
            with suppress(Exception):
                client.close()
        raise


def consumer(
    access: Access,
    servers: Sequence[str],
    group: str,
    timeout_seconds: float,
    max_message_bytes: int,
    look_seconds: float,
) -> Any:
    """A `kafka.KafkaConsumer` whose place is the caller's to keep; needs the client library.

    Args:
        access: how.
        servers: ``host:port`` of some brokers.
        group: for whom offsets may be noted; nothing is committed by itself.
        timeout_seconds: bound on connecting and on each request.
        max_message_bytes: that it has to be able to fetch.
        look_seconds: how old may be what it knows of partitions.

    Raises:
        ConnectionError, ValueError, OSError: as `reach`.
    """
    from kafka import KafkaConsumer  # type: ignore[import-untyped]

    reach(access, servers, timeout_seconds)
    millis = max(100, int(timeout_seconds * 1000))
    return built(
        KafkaConsumer,
        bootstrap_servers=list(servers),
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        metadata_max_age_ms=max(100, int(look_seconds * 1000)),
        allow_auto_create_topics=False,
        bootstrap_timeout_ms=millis,
        request_timeout_ms=millis,
        fetch_max_wait_ms=min(500, millis // 2),
        max_partition_fetch_bytes=max(max_message_bytes, 1 << 20),
        reconnect_backoff_max_ms=1000,
        metrics_enabled=False,
        **access.settings(),
    )


_REFUSALS: Final = (
    "CERTIFICATE_VERIFY_FAILED",
    "certificate verify failed",
    "alert unknown ca",
    "alert bad certificate",
    "certificate required",
    "AuthenticationFailed",
    "Authentication failed",
    "SaslAuthentication",
)


def is_refusal(error: BaseException) -> bool:
    """Whether the two sides do not trust each other: a certificate or a login was refused."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {seen}"
        if any(mark in text for mark in _REFUSALS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def login(access: Access, servers: Sequence[str], timeout_seconds: float) -> None:
    """Return when a broker accepts our login; needs the client library.

    The client by itself tries a wrong password again and again and then tells of a timeout.

    Raises:
        ConnectionError: the login was refused, which `is_refusal` knows, or nobody answered.
    """
    from kafka.errors import KafkaError
    from kafka.net.compat import KafkaNetClient

    client = KafkaNetClient(bootstrap_servers=list(servers), **access.settings())

    async def attempt() -> None:
        manager = client._manager
        node = manager.cluster.bootstrap_brokers()[0].node_id
        await manager.get_connection(
            node,
            timeout_ms=timeout_seconds * 1000,
            pop_on_close=False,
            refresh_metadata_on_err=False,
            reset_backoff_on_connect=False,
        )

    try:
        client._net.run(attempt)
    except KafkaError as error:
        raise ConnectionError(f"login of {access.username!r}: {error}") from error
    finally:
        client.close()

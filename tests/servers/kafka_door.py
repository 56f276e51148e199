"""A door before the broker: ends TLS, asks for a login, and passes everything else through.

The broker of the tests speaks plain text only. The door listens on another loopback address and the
same port, and puts its own address in place of the broker's in what the broker says of itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_SECONDS

_BROKER, _DOOR = "127.0.0.1", "127.0.0.3"
_PRODUCE, _HANDSHAKE, _AUTHENTICATE, _VERSIONS = 0, 17, 36, 18
_FAILED = 58
_ROUNDS = 4096


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files of one authority.

    Attributes:
        ca: the authority's certificate.
        server, server_key: for the door's address.
        client, client_key: for whoever has to show one.
    """

    ca: str
    server: str
    server_key: str
    client: str
    client_key: str


def certificates(folder: Path) -> Certificates:
    """A new authority, and what it signed."""
    folder.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str) -> None:
        try:
            subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)
        except FileNotFoundError:
            pytest.skip("no openssl: apt-get install openssl")

    elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *elliptic, "-subj", "/CN=tests", "-days", "2", "-keyout", "ca.key",
        "-out", "ca.pem")  # fmt: skip
    (folder / "names").write_text(f"subjectAltName=IP:{_DOOR},IP:{_BROKER},DNS:localhost")
    for name in ("server", "client"):
        run("req", *elliptic, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "request")
        run("x509", "-req", "-in", "request", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
            "-set_serial", str(secrets.randbits(64)), "-extfile", "names",
            "-out", f"{name}.pem")  # fmt: skip
    files = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return Certificates(*(str(folder / file) for file in files))


class Door:
    """Listens from construction until `close`.

    Args:
        broker: ``host:port`` of the plain broker.
        tls: the server's side; none for plain text.
        logins: user → password; empty asks for none.

    Attributes:
        address: ``host:port`` for clients.
        refused: logins that were turned away.
        cuts: so many acknowledgements are lost from now on, and their connections with them.
    """

    def __init__(
        self,
        broker: str,
        tls: ssl.SSLContext | None = None,
        logins: dict[str, str] | None = None,
    ) -> None:
        self._port = int(broker.rpartition(":")[2])
        self._tls = tls
        self._logins = logins or {}
        self.refused = 0
        self.cuts = 0
        self.address = f"{_DOOR}:{self._port}"
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server((_DOOR, self._port))
        self._spawn(self._accept)

    def close(self) -> None:
        """Cut everything."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for one in list(self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(PATIENCE_SECONDS)
        self._sockets.add(client)
        try:
            if self._tls is not None:
                self._sockets.discard(client)
                client = self._tls.wrap_socket(client, server_side=True)
                self._sockets.add(client)
            with socket.create_connection((_BROKER, self._port)) as broker:
                self._talk(client, broker)
        except (OSError, EOFError, struct.error, KeyError, StopIteration):
            pass
        finally:
            self._sockets.discard(client)
            client.close()

    def _talk(self, client: socket.socket, broker: socket.socket) -> None:
        """One request after the other: the client may send ahead, and waits for its turn."""
        known = not self._logins
        scram: _Scram | None = None
        while True:
            frame = _read(client)
            api, version, correlation = struct.unpack_from(">hhi", frame)
            if api == _HANDSHAKE:
                scram = _Scram(self._logins)
                names = ("SCRAM-SHA-256", "PLAIN")
                body = struct.pack(">hi", 0, len(names))
                body += b"".join(struct.pack(">h", len(n)) + n.encode() for n in names)
                _write(client, struct.pack(">i", correlation) + body)
            elif api == _AUTHENTICATE and scram is not None:
                length = struct.unpack_from(">h", frame, 8)[0]
                begin = 10 + max(length, 0)
                answer = scram.answer(frame[begin + 4 :])
                self.refused += answer is None
                known = known or scram.known
                why = b"wrong user or password"
                body = struct.pack(">hh", 0, -1) if answer is not None else b""
                if answer is None:
                    body = struct.pack(">hh", _FAILED, len(why)) + why
                body += struct.pack(">i", len(answer or b"")) + (answer or b"")
                body += struct.pack(">q", 0) if version >= 1 else b""
                _write(client, struct.pack(">i", correlation) + body)
            elif known or api == _VERSIONS:
                broker.sendall(struct.pack(">i", len(frame)) + frame)
                answer_frame = _read(broker)
                if api == _PRODUCE and self.cuts:
                    self.cuts -= 1
                    return
                _write(client, answer_frame.replace(_BROKER.encode(), _DOOR.encode()))
            else:
                return


class _Scram:
    """The server's side of PLAIN and SCRAM-SHA-256 (RFC 5802)."""

    def __init__(self, logins: dict[str, str]) -> None:
        self._logins = logins
        self._said = ""
        self._key = b""
        self.known = False

    def answer(self, token: bytes) -> bytes | None:
        """The next answer; none where the login is refused."""
        if token.count(b"\0") == 2:
            _, user, password = token.decode().split("\0")
            self.known = self._logins.get(user) == password
            return b"" if self.known else None
        text = token.decode()
        if not self._said:
            bare = text.removeprefix("n,,")
            fields = dict(part.split("=", 1) for part in bare.split(","))
            salt = secrets.token_bytes(16)
            password = self._logins.get(fields["n"], secrets.token_hex())
            self._key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ROUNDS)
            nonce = fields["r"] + secrets.token_hex(8)
            first = f"r={nonce},s={base64.b64encode(salt).decode()},i={_ROUNDS}"
            self._said = f"{bare},{first}"
            return first.encode()
        without, _, proof = text.rpartition(",p=")
        said = f"{self._said},{without}".encode()
        client = _sign(self._key, b"Client Key")
        signature = _sign(hashlib.sha256(client).digest(), said)
        expected = bytes(a ^ b for a, b in zip(client, signature, strict=True))
        self.known = hmac.compare_digest(expected, base64.b64decode(proof))
        server = _sign(_sign(self._key, b"Server Key"), said)
        return b"v=" + base64.b64encode(server) if self.known else None


def _sign(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).digest()


def _read(source: socket.socket) -> bytes:
    (length,) = struct.unpack(">i", _exactly(source, 4))
    return _exactly(source, length)


def _exactly(source: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = source.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _write(target: socket.socket, frame: bytes) -> None:
    target.sendall(struct.pack(">i", len(frame)) + frame)


def server_context(files: Certificates, *, ask_client: bool = False) -> ssl.SSLContext:
    """The door's side of TLS; `ask_client` for mutual TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    if ask_client:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context

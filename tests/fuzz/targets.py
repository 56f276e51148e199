"""What reads bytes from outside, with examples of what it reads."""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from oodmon.admission import Admission
from oodmon.calibration import Calibration
from oodmon.config.parse import loads
from oodmon.daemon.bodies import labels_of, outputs_of, scores_of
from oodmon.daemon.porter import _Handler
from oodmon.errors import OodmonError
from oodmon.feeds.kafka.lanes import Lane, Spoilt
from oodmon.feeds.spool.partition import Partition
from oodmon.feeds.spool.segments import SEGMENT_HEADER, Damage, frame_of
from oodmon.records import ScoreBatch
from oodmon.registry import kinds
from oodmon.secret import Secret
from oodmon.wire import decode_batch, encode_batch, unpack
from tests.properties.test_config import VALID

__all__ = ["TARGETS", "Target"]

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "wire"
TOKEN: Final = "fuzz-token"
FRAME: Final = "application/vnd.oodmon.score-batch"


@dataclass(frozen=True, slots=True)
class Target:
    """One reader of bytes.

    Attributes:
        name: for people.
        seeds: examples.
        words: pieces of its format.
        open: makes the function that is given each input; `OodmonError` is an answer.
        share: of all inputs; a slow reader gets fewer.
        spare_bytes, factor: memory that it may take: spare + factor × length of the input.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    words: tuple[bytes, ...]
    open: Callable[[], Any]
    share: float
    spare_bytes: int = 1 << 18
    factor: int = 40


def batch_of(sequence: int) -> ScoreBatch:
    """A batch with a bit of everything."""
    return ScoreBatch(
        model="m",
        version="1",
        source="a",
        sequence=sequence,
        observed_at=1_700_000_000_000_000_000 + sequence,
        scores={"msp": np.array([0.5, np.nan], np.float32), "gram": np.ones(2, np.float32)},
        digests={"msp": "0123456789abcdef"},
        sample_ids=("one", "t\\w\no"),
        segment=np.array([0, 1], np.int32),
        segments=("eu", "us"),
        predicted=np.array([3, 4], np.int32),
        notices=("note",),
    )


def _frames() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.frame"))]


@contextmanager
def _wire() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        for decode in (decode_batch, unpack):
            with suppress(OodmonError):
                decode(data)

    yield run


@contextmanager
def _folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    place = tempfile.mkdtemp(prefix="oodmon-fuzz-", dir=memory if memory.is_dir() else None)
    try:
        yield Path(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _segments() -> list[bytes]:
    frames = [frame_of(encode_batch(batch_of(n))) for n in range(3)]
    return [SEGMENT_HEADER + b"".join(frames), SEGMENT_HEADER + frames[0] + frames[1][:50]]


@contextmanager
def _spool() -> Iterator[Callable[[bytes], None]]:
    with _folder() as root:
        folder = root / "writer-00000000"
        folder.mkdir(mode=0o700)

        def run(data: bytes) -> None:
            (folder / "0000000000.seg").write_bytes(data)
            partition = Partition(folder, None, 1 << 16, Damage(), time.monotonic)
            while partition.load():
                partition.take()
            assert partition.finished or partition.problem, "the reader waits for a dead writer"

        yield run


def _configs() -> list[bytes]:
    return [VALID.encode(), VALID[: len(VALID) // 2].encode(), b"a: &a [*a, *a]\n"]


@contextmanager
def _config() -> Iterator[Callable[[bytes], None]]:
    for kind in ("feeds", "drift", "sinks", "triggers"):
        kinds[kind].names()  # an unknown name imports the whole folder, once

    def run(data: bytes) -> None:
        loads(data, "daemon", environment={"KAFKA": "k:1", "SECRET": "s"})

    yield run


def _bodies() -> list[bytes]:
    scores = {
        "model": "m", "version": "1", "source": "a", "sequence": 1, "observed_at": 5,
        "scores": {"msp": [0.5, None], "energy": [1, 2e3]}, "digests": {"msp": "0123"},
        "sample_ids": ["a", "b\\n"], "segment": [0, 1], "segments": ["x", "y"],
        "predicted": [1, 2], "dropped": 0, "sampled_fraction": 0.5, "notices": ["n"],
    }  # fmt: skip
    tensor = {"name": "logits", "datatype": "FP32", "shape": [2, 2], "data": [1.0, 2, 3e4, -1]}
    answer = {"model_name": "m", "model_version": "1", "id": "r", "outputs": [tensor]}
    nested = {**answer, "outputs": [{**tensor, "data": [[1, 2], [3, 4]]}]}
    binary = {
        **answer,
        "outputs": [{**tensor, "data": None, "parameters": {"binary_data_size": 16}}],
    }
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t.response", "data": answer,
             "time": "2023-11-14T22:13:20.5Z"}  # fmt: skip
    texts = [json.dumps(one).encode() for one in (scores, answer, nested, event)]
    labels = json.dumps({"labels": {"a": 1, "b": 20}}).encode()
    return [*texts, json.dumps(binary).encode() + b"\0" * 16, encode_batch(batch_of(0)), labels]


_SPLIT = len(_bodies()[4]) - 16
_HEADERS: tuple[Mapping[str, str], ...] = (
    {"content-type": "application/json", "ce-id": "1", "ce-type": "a.response"},
    {"content-type": "application/cloudevents+json"},
    {"inference-header-content-length": str(_SPLIT)},
)


@contextmanager
def _intake_bodies() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        with suppress(OodmonError):
            scores_of(data, "application/json")
        with suppress(OodmonError):
            outputs_of(data, _HEADERS[len(data) % len(_HEADERS)])
        with suppress(OodmonError):
            labels_of(data)

    yield run


def _requests() -> list[bytes]:
    found = []
    for body in _bodies():
        for path in ("/v1/batches", "/v1/outputs", "/v1/labels"):
            kind = FRAME if body[:1] not in b"{[" else "application/json"
            head = (
                f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
                f"Content-Type: {kind}\r\nce-type: a.response\r\nce-time: 2023-11-14T22:13:20Z\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            found.append(head.encode() + body)
    return found


class _Wire:
    """A socket that has already received everything."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.sent = b""

    def makefile(self, mode: str, size: int = -1) -> io.BytesIO:
        return io.BytesIO(self._data)

    def settimeout(self, seconds: float) -> None:
        """Nothing to wait for."""

    def sendall(self, data: bytes) -> None:
        self.sent += data


class _Taker:
    def admit(self) -> float:
        return 0.0

    def take_batch(self, body: bytes, content_type: str) -> int:
        return scores_of(body, content_type)[0].rows

    def take_outputs(self, body: bytes, headers: Mapping[str, str]) -> int:
        found = outputs_of(body, headers)
        return 0 if found is None else len(found.logits)

    def take_labels(self, body: bytes) -> int:
        return len(labels_of(body))

    def count(self, kind: str, status: int) -> None:
        """Nobody asks."""


@contextmanager
def _intake_requests() -> Iterator[Callable[[bytes], None]]:
    server: Any = SimpleNamespace(taker=_Taker(), options=Admission(token=Secret(TOKEN)))

    def run(data: bytes) -> None:
        wire = _Wire(data)
        _Handler(wire, ("127.0.0.1", 1), server)  # type: ignore[arg-type]
        assert not wire.sent or wire.sent.startswith((b"HTTP/1.1 ", b"<!DOCTYPE", b"<html")), (
            wire.sent[:80]
        )
        assert b" 500 " not in wire.sent[:20]
        assert TOKEN.encode() not in wire.sent, "the token was sent back"

    yield run


def _calibrations() -> list[bytes]:
    scores = np.random.default_rng(0).normal(size=60).astype(np.float32)
    with _folder() as folder:
        Calibration.from_scores("msp", "0123456789abcdef", scores).save(folder / "c")
        return [(folder / "c").read_bytes()]


@contextmanager
def _calibration() -> Iterator[Callable[[bytes], None]]:
    with _folder() as folder:
        path = folder / "c.safetensors"

        def run(data: bytes) -> None:
            path.write_bytes(data)
            Calibration.load(path)

        yield run


def _states() -> list[bytes]:
    import torch

    from oodmon.detectors import Reference, Scorer
    from oodmon.registry import detectors

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(8, 3)).astype(np.float32))
    layers = {"l": torch.from_numpy(rng.normal(size=(8, 2, 2, 2)).astype(np.float32))}
    reference = Reference.from_arrays(layers=layers, logits=logits, labels=logits.argmax(1), seed=0)
    made = []
    with _folder() as folder:
        for name, options in (("msp", {}), ("gram", {"layers": ("l",)})):
            Scorer.learn(detectors.create(name, **options), reference).save(folder / name)
            made.append((folder / name).read_bytes())
    return made


@contextmanager
def _state() -> Iterator[Callable[[bytes], None]]:
    from oodmon.detectors import Scorer

    with _folder() as folder:
        path = folder / "s.safetensors"

        def run(data: bytes) -> None:
            path.write_bytes(data)
            Scorer.load(path)

        yield run


def _messages() -> list[bytes]:
    """A message: number of the writer's digits, header values, then the frame."""
    return [b"a-0123\n%d\n" % n + encode_batch(batch_of(n)) for n in range(3)]


@contextmanager
def _message() -> Iterator[Callable[[bytes], None]]:
    lane = Lane("t", 0, {}, 4, Spoilt())

    def run(data: bytes) -> None:
        writer, _, rest = data.partition(b"\n")
        number, _, value = rest.partition(b"\n")
        headers = [("oodmon_writer", writer), ("oodmon_number", number)]
        lane.fetched += 1
        lane.waiting.append(SimpleNamespace(offset=lane.fetched, value=value, headers=headers))
        for _, name in list(lane.admit()):
            lane.take(name)
        lane._blocked.clear()
        lane._open.clear()

    yield run


_WIRE_WORDS = (b'"scores"', b'"F32"', b'"shape":[', b'"data_offsets":[', b'"oodmon":"', b'\\"',
               b"oodmon.score_batch/", b"oodmon.arrays/1", b'"needs"', b'"BOOL"')  # fmt: skip
_YAML_WORDS = (b"${", b"<<: *a", b"&a ", b"*a", b"!!int ", b"!!python/object:os.system ",
               b"---\n", b"%YAML 1.9\n", b"|+9\n", b"\t", b"\xe2\x80\xa8", b"'", b'"', b": ",
               b"- ")  # fmt: skip
_HTTP_WORDS = (b"\r\n", b"\r\n\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n",
               b"Expect: 100-continue\r\n", b"HTTP/0.9", b"HTTP/9.9", b"GET ", b"HEAD ",
               b"Inference-Header-Content-Length: ", b"ce-", b"\x00", b": ")  # fmt: skip
_JSON_WORDS = (b'"outputs":', b'"shape":[1073741824,4]', b'"data_base64":"', b'"scores":{',
               b'"FP64"', b'"FP16"', b"\\u0000", b"\\ud800", b"1e308,")  # fmt: skip
_SEGMENT_WORDS = (SEGMENT_HEADER, b"\xf5\xf8OM", struct.pack("<I", 1 << 31), b"OODSPOOL")

TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target("wire frames", _frames, _WIRE_WORDS, _wire, 0.34),
        Target("kafka messages", _messages, _WIRE_WORDS, _message, 0.2),
        Target("intake bodies", _bodies, _JSON_WORDS, _intake_bodies, 0.25),
        Target("intake requests", _requests, _HTTP_WORDS, _intake_requests, 0.1),
        Target("spool segments", _segments, _SEGMENT_WORDS, _spool, 0.05, 1 << 20),
        Target("calibrations", _calibrations, _WIRE_WORDS, _calibration, 0.03, 1 << 20),
        Target("states", _states, _WIRE_WORDS, _state, 0.02, 1 << 20),
        Target("config YAML", _configs, _YAML_WORDS, _config, 0.01, 2 << 20, 400),
    )
}


@functools.cache
def seeds_of(name: str) -> tuple[bytes, ...]:
    """The examples of a target, made once."""
    return tuple(TARGETS[name].seeds())

"""The HTTP intake: what is taken is in the spool, and what is not is told why."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodmon.admission import Admission
from oodmon.daemon.inlet import Inlet
from oodmon.daemon.metrics import Metrics
from oodmon.errors import ContractError, StateError
from oodmon.feeds.spool import Spool
from oodmon.records import ScoreBatch
from oodmon.secret import Secret
from oodmon.wire import encode_batch
from tests.servers.kafka_door import certificates
from tests.waiting import PATIENCE_SECONDS, eventually

TOKEN = "let-me-in-42"
NOW = 1_700_000_000_000_000_000
FRAME = "application/vnd.oodmon.score-batch"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(str(tmp_path / "spool"))


@pytest.fixture
def opened(spool: Spool) -> Iterator[Callable[..., Inlet]]:
    running: list[Inlet] = []

    def start(feed: Spool = spool, **options: Any) -> Inlet:
        made = Admission(**{"port": 0, "token": Secret(TOKEN), **options})
        inlet = Inlet(made, feed, "m", "1", metrics=Metrics(), clock=lambda: NOW)
        running.append(inlet)
        inlet.start()
        return inlet

    yield start
    for inlet in running:
        inlet.stop()
        inlet.stop()
        assert inlet._listener.ended


def post(
    inlet: Inlet,
    path: str,
    body: bytes,
    headers: dict[str, str] | None = None,
    token: str = TOKEN,
    context: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    made = http.client.HTTPSConnection if context else http.client.HTTPConnection
    extra: dict[str, Any] = {"context": context} if context else {}
    connection = made("127.0.0.1", inlet.port, timeout=PATIENCE_SECONDS, **extra)
    try:
        login = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("POST", path, body, {**login, **(headers or {})})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(answer.read() or b"{}"), found
    finally:
        connection.close()


def stored(spool: Spool) -> list[ScoreBatch]:
    reader = spool.reader()
    try:
        reader.seek({})
        return [delivery.batch for delivery in reader.poll(1000, 0.02)]
    finally:
        reader.close()


def frame(sequence: int = 0, **fields: Any) -> bytes:
    scores = {"msp": np.array([0.5, np.nan], np.float32)}
    options = {"model": "m", "version": "1", "source": "a", "observed_at": NOW, **fields}
    return encode_batch(ScoreBatch(sequence=sequence, scores=scores, **options))


JSON = {"content-type": "application/json"}


def test_a_frame_is_stored_before_the_answer(
    opened: Callable[..., Inlet], spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inlet = opened()
    synced: list[Any] = []
    real = os.fdatasync

    def watched(descriptor: Any) -> None:
        real(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", watched)
    answer = post(inlet, "/v1/batches", frame(3), {"content-type": FRAME})
    assert answer[:2] == (200, {"rows": 2})
    assert synced
    (batch,) = stored(spool)
    assert (batch.source, batch.sequence, batch.observed_at) == ("a", 3, NOW)


def test_json_is_the_same_record(opened: Callable[..., Inlet], spool: Spool) -> None:
    inlet = opened()
    body = {"source": "edge", "scores": {"msp": [1.5, None, 2]}, "sample_ids": ["x", "y", "z"]}
    for _ in range(2):
        assert post(inlet, "/v1/batches", json.dumps(body).encode(), JSON)[0] == 200
    numbered = {**body, "sequence": 7, "observed_at": NOW - 5, "predicted": [1, 2, 3]}
    assert post(inlet, "/v1/batches", json.dumps(numbered).encode(), JSON)[0] == 200
    found = sorted(stored(spool), key=lambda batch: (batch.source, batch.sequence))
    assert [batch.sequence for batch in found] == [7, 0, 1]
    assert found[0].source == "edge"
    assert found[0].observed_at == NOW - 5
    np.testing.assert_array_equal(found[1].scores["msp"], np.array([1.5, np.nan, 2], np.float32))
    assert found[1].source.startswith("edge@")
    assert found[1].observed_at == NOW
    assert found[0].predicted.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{}", "scores"),
        (b'{"scores": {"a": [1]}}', "source"),
        (b'{"source": "a", "scores": {"a": ["x"]}}', "scores.a"),
        (b'{"source": "a", "scores": {"a": [1], "b": [1, 2]}}', "rows"),
        (b'{"source": "a", "scores": {"a": [1]}, "extra": 1}', "extra"),
        (b'{"source": "a", "scores": {"a": [1]}, "model": "other"}', "not watched"),
        (b'{"source": "a", "scores": {"a": [1]}, "sequence": -1}', "sequence"),
        (b'{"source": "a", "scores": {"a": [1' + b"0" * 400 + b"]}}", "scores.a"),
        (b'{"source": "a", "scores": {"a": [1]}, "observed_at": 1800000000000000000}', "future"),
        (b"[" * 100_000, "levels"),
        (b"[" + b"[]," * 100_000 + b"[]]", "lists"),
        (b'{"\\ud800": 1}', "unknown"),
    ],
)
def test_what_is_wrong_is_told(
    opened: Callable[..., Inlet], spool: Spool, body: bytes, word: str
) -> None:
    status, answer, _ = post(opened(), "/v1/batches", body, JSON)
    assert status == 422
    assert word in answer["error"]
    assert len(answer["error"]) < 500
    assert not stored(spool)


def test_who_is_let_in(opened: Callable[..., Inlet], spool: Spool) -> None:
    inlet = opened()
    kind = {"content-type": FRAME}
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x"):
        status, answer, headers = post(inlet, "/v1/batches", frame(), kind, token)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert TOKEN not in json.dumps(answer)
    assert post(inlet, "/other", b"", kind)[0] == 404
    assert post(inlet, "/v1/batches", b"", {"content-type": "text/plain"})[0] == 415
    assert post(inlet, "/v1/batches", b"", {**kind, "content-encoding": "gzip"})[0] == 415
    assert not stored(spool)
    text = inlet._metrics.render().decode()
    assert 'oodmon_intake_requests_total{code="401",kind="batch"} 4' in text
    assert TOKEN not in text
    assert TOKEN not in repr(inlet.options)


def test_a_certificate_lets_in(opened: Callable[..., Inlet], tmp_path: Path, spool: Spool) -> None:
    files = certificates(tmp_path / "ca")
    inlet = opened(
        token=Secret(),
        certificate_file=files.server,
        key_file=files.server_key,
        client_ca_file=files.ca,
    )
    known = ssl.create_default_context(cafile=files.ca)
    known.load_cert_chain(files.client, files.client_key)
    kind = {"content-type": FRAME}
    assert post(inlet, "/v1/batches", frame(), kind, "", known)[0] == 200
    unknown = ssl.create_default_context(cafile=files.ca)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.BadStatusLine)):
        post(inlet, "/v1/batches", frame(1), kind, "", unknown)
    with pytest.raises((ConnectionError, http.client.BadStatusLine, TimeoutError)):
        post(inlet, "/v1/batches", frame(1), kind, "")
    assert len(stored(spool)) == 1


def test_limits(opened: Callable[..., Inlet], spool: Spool) -> None:
    inlet = opened(max_body_bytes=1024, requests_per_second=3.0)
    kind = {"content-type": FRAME}
    assert post(inlet, "/v1/batches", b"x" * 1025, kind)[0] == 413
    assert post(inlet, "/v1/batches", frame(), kind)[0] == 200
    answers = [post(inlet, "/v1/batches", frame(n), kind) for n in range(1, 6)]
    assert 429 in {status for status, _, _ in answers}
    refused = next(headers for status, _, headers in answers if status == 429)
    assert int(refused["retry-after"]) >= 1
    assert len(stored(spool)) == 1 + sum(status == 200 for status, _, _ in answers)


def test_a_body_without_a_length_is_refused(opened: Callable[..., Inlet]) -> None:
    inlet = opened()
    for head in (b"", b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n"):
        with socket.create_connection(("127.0.0.1", inlet.port), PATIENCE_SECONDS) as raw:
            login = f"Authorization: Bearer {TOKEN}\r\n".encode()
            kind = b"Content-Type: application/json\r\n"
            raw.sendall(b"POST /v1/batches HTTP/1.1\r\nHost: x\r\n" + login + kind + head + b"\r\n")
            assert b" 411 " in raw.recv(4096)


def test_slow_clients_do_not_keep_others_out(
    opened: Callable[..., Inlet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oodmon.daemon.porter._CONNECTION_SECONDS", 10 * PATIENCE_SECONDS)
    monkeypatch.setattr("oodmon.daemon.porter._READ_SECONDS", 10 * PATIENCE_SECONDS)
    inlet = opened(max_requests=2)
    door = inlet._listener.server
    assert door is not None
    slow = [socket.create_connection(("127.0.0.1", inlet.port), PATIENCE_SECONDS) for _ in range(2)]
    try:
        for one in slow:
            one.sendall(b"POST /v1/ba")
        eventually(lambda: door._free._value == 0)  # both have a thread
        kind = {"content-type": FRAME}

        def answered() -> int:
            try:
                return post(inlet, "/v1/batches", frame(), kind)[0]
            except ConnectionError:  # turned away while it was still talking
                return 503

        assert answered() == 503
        door._longest = 0.5
        eventually(lambda: answered() == 200, "slow clients hold every place for good")
    finally:
        for one in slow:
            one.close()


def test_a_full_spool_is_told_as_429(opened: Callable[..., Inlet], tmp_path: Path) -> None:
    small = Spool(str(tmp_path / "small"), max_bytes=1 << 13, segment_bytes=1 << 12)
    inlet = opened(small)
    answers = [
        post(inlet, "/v1/batches", frame(n, notices=("x" * 900,)), {"content-type": FRAME})
        for n in range(12)
    ]
    taken = [status for status, _, _ in answers if status == 200]
    status, answer, headers = answers[-1]
    assert status == 429
    assert "full" in answer["error"]
    assert headers["retry-after"] == "1"
    assert [batch.sequence for batch in stored(small)] == list(range(len(taken)))


def test_a_disk_that_does_not_sync_is_no_success(
    opened: Callable[..., Inlet], monkeypatch: pytest.MonkeyPatch
) -> None:
    inlet = opened()

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    status, answer, headers = post(inlet, "/v1/batches", frame(), {"content-type": FRAME})
    assert status == 503
    assert "fsync" in answer["error"]
    assert headers["retry-after"]


# Raw outputs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from oodmon.detectors import Reference, Scorer
    from oodmon.registry import detectors

    folder = tmp_path_factory.mktemp("states")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    layer = rng.normal(size=(40, 4, 2, 2)).astype(np.float32)
    import torch

    reference = Reference.from_arrays(
        layers={"l": torch.from_numpy(layer)},
        logits=torch.from_numpy(logits),
        labels=torch.from_numpy(logits.argmax(1)),
        seed=0,
    )
    for name, options in (("msp", {}), ("energy", {}), ("gram", {"layers": ("l",)})):
        scorer = Scorer.learn(detectors.create(name, **options), reference)
        scorer.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def scoring(
    states: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Inlet, Spool]]:
    spool = Spool(str(tmp_path_factory.mktemp("outputs") / "spool"))
    options = Admission(port=0, token=Secret(TOKEN), states_folder=str(states), queue_requests=1)
    inlet = Inlet(options, spool, "m", "1", metrics=Metrics(), clock=lambda: NOW)
    inlet.start()
    yield inlet, spool
    inlet.stop()


LOGITS = [[4.0, 0.0, -1.0], [0.1, 0.2, 0.0]]
EVENT = {
    "ce-specversion": "1.0",
    "ce-source": "http://localhost:9081/",
    "ce-type": "org.kubeflow.serving.inference.response",
    "ce-time": "2023-11-14T22:13:20.5Z",
    "content-type": "application/json",
}


def answer(data: Any, shape: list[int] | None = None, **tensor: Any) -> dict[str, Any]:
    one = {"name": "logits", "datatype": "FP32", "shape": shape or [2, 3], "data": data, **tensor}
    return {"model_name": "m", "model_version": "1", "id": "req-9", "outputs": [one]}


def test_outputs_of_kserve_are_scored(scoring: tuple[Inlet, Spool], states: Path) -> None:
    import torch

    from oodmon.detectors import Scorer
    from oodmon.records import Activations

    inlet, spool = scoring
    flat = json.dumps(answer([4.0, 0.0, -1.0, 0.1, 0.2, 0.0])).encode()
    nested = json.dumps(answer(LOGITS)).encode()
    raw = np.array(LOGITS, "<f4").tobytes()
    head = json.dumps(answer(None, parameters={"binary_data_size": len(raw)})).encode()
    structured = {
        "specversion": "1.0", "id": "e4", "source": "s", "type": "x.response",
        "time": "2023-11-14T22:13:20Z", "data": answer(LOGITS),
    }  # fmt: skip
    encoded = {**structured, "id": "e5"}
    encoded["data_base64"] = base64.b64encode(nested).decode()
    del encoded["data"]
    cloud = {"content-type": "application/cloudevents+json; charset=utf-8"}
    for number, (body, headers) in enumerate(
        (
            (flat, {**EVENT, "ce-id": "e1"}),
            (nested, {**EVENT, "ce-id": "e2"}),
            (
                head + raw,
                {**EVENT, "ce-id": "e3", "Inference-Header-Content-Length": str(len(head))},
            ),
            (json.dumps(structured).encode(), cloud),
            (json.dumps(encoded).encode(), cloud),
        )
    ):
        assert post(inlet, "/v1/outputs", body, headers)[:2] == (200, {"rows": 2}), number
    assert post(inlet, "/v1/outputs", flat, {**EVENT, "ce-id": "e1"})[1] == {"rows": 0}, "a repeat"
    request = {**EVENT, "ce-id": "e6", "ce-type": "org.kubeflow.serving.inference.request"}
    assert post(inlet, "/v1/outputs", b"{}", request)[:2] == (200, {"rows": 0})
    found = stored(spool)
    assert sorted(batch.sequence for batch in found) == list(range(5))
    direct = {name: Scorer.load(states / f"{name}.safetensors") for name in ("msp", "energy")}
    acts = Activations(logits=torch.tensor(LOGITS))
    for batch in found:
        assert set(batch.scores) == {"msp", "energy"}, "gram reads layers, which nobody sends"
        assert batch.digests["msp"]
        for name in ("msp", "energy"):
            expected = direct[name].score(acts).numpy()
            np.testing.assert_allclose(batch.scores[name], expected, rtol=1e-6)
        assert batch.sample_ids == ("req-9/0", "req-9/1")
        assert batch.predicted.tolist() == [0, 1]
        assert batch.observed_at in (NOW, NOW + 500_000_000)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (answer([1.0]), "do not fill"),
        (answer([[1.0, 2.0, 3.0], [1.0]]), "lengths"),
        (answer(["x"] * 6), "numbers"),
        (answer(None, parameters={"binary_data_size": 10}), "binary_data_size"),
        (answer([], [2, 0]), "without classes"),
        (answer([1.0], [1 << 40, 1 << 40]), "do not fill"),
        (answer([1], datatype="INT64"), "floating"),
        ({"model_name": "other", "outputs": answer(LOGITS)["outputs"]}, "not watched"),
        ({"outputs": []}, "outputs"),
        ({"predictions": [1]}, "outputs"),
        ([1], "object"),
    ],
)
def test_outputs_that_are_none(scoring: tuple[Inlet, Spool], body: Any, word: str) -> None:
    status, told, _ = post(scoring[0], "/v1/outputs", json.dumps(body).encode(), EVENT)
    assert status == 422
    assert word in told["error"]


@pytest.mark.parametrize("when", ["yesterday", "2023-13-01T00:00:00Z", "1950-01-01T00:00:00Z"])
def test_times_that_are_none(scoring: tuple[Inlet, Spool], when: str) -> None:
    body = json.dumps(answer(LOGITS)).encode()
    status, told, _ = post(scoring[0], "/v1/outputs", body, {**EVENT, "ce-time": when})
    assert status == 422
    assert "time" in told["error"]


def test_the_line_for_scoring_has_an_end(scoring: tuple[Inlet, Spool]) -> None:
    inlet, _ = scoring
    annex = inlet._annex
    assert annex is not None
    body = json.dumps(answer(LOGITS)).encode()
    results: list[int] = []
    with annex._turn:  # the one place in the line is taken by whoever comes first
        waiting = threading.Thread(
            target=lambda: results.append(post(inlet, "/v1/outputs", body, EVENT)[0])
        )
        waiting.start()
        eventually(lambda: annex._places._value == 0)
        status, told, headers = post(inlet, "/v1/outputs", body, EVENT)
        assert (status, headers["retry-after"]) == (429, "1")
        assert "full" in told["error"]
    waiting.join(PATIENCE_SECONDS)
    assert results == [200]


def test_a_scoring_process_that_dies_is_replaced(
    scoring: tuple[Inlet, Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    inlet, _ = scoring
    monkeypatch.setattr("oodmon.daemon.annex._PAUSE_SECONDS", 0.0)
    assert inlet._annex is not None
    assert inlet._annex._process is not None
    inlet._annex._process.kill()
    body = json.dumps(answer(LOGITS)).encode()
    status, _, headers = post(inlet, "/v1/outputs", body, EVENT)
    assert status == 503
    assert headers["retry-after"]
    assert post(inlet, "/v1/outputs", body, EVENT)[0] == 200


def test_states_that_cannot_be_used_are_told_at_once(
    opened: Callable[..., Inlet], tmp_path: Path, states: Path
) -> None:
    with pytest.raises(StateError, match="logits only"):
        opened(states_folder=str(tmp_path))
    with pytest.raises(StateError, match="more than logits"):
        opened(states_folder=str(states), detectors=("gram",))


def test_without_states_outputs_are_refused(opened: Callable[..., Inlet]) -> None:
    status, told, _ = post(opened(), "/v1/outputs", b"{}", EVENT)
    assert status == 422
    assert "states_folder" in told["error"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "token"),
        ({"host": "0.0.0.0", "token": Secret("t")}, "certificate_file"),
        ({"host": "0.0.0.0", "without_login": True}, "without_login"),
        ({"token": Secret("t"), "certificate_file": "c"}, "key_file"),
        ({"client_ca_file": "c"}, "client_ca_file"),
        ({"token": Secret("t"), "port": 70_000}, "port"),
        ({"token": Secret("t"), "max_body_bytes": 1}, "max_body_bytes"),
        ({"token": Secret("t"), "requests_per_second": 0.0}, "requests_per_second"),
    ],
)
def test_options_that_would_leave_a_door_open(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ContractError, match=word):
        Admission(**options)

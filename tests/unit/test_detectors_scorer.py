"""Scorers: files that are whole or refused, digests, moving, what is pinned; references."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.gram import Gram
from oodmon.detectors.logits import MSP
from oodmon.detectors.reference import gather
from oodmon.detectors.rnd import RND
from oodmon.detectors.scorer import made_for
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations


def acts(rows: int = 80, seed: int = 0) -> Activations:
    draw = torch.Generator().manual_seed(seed)
    return Activations(
        layers={
            "early": torch.randn(rows, 3, 2, 2, generator=draw),
            "late": torch.randn(rows, 5, generator=draw),
        },
        logits=torch.randn(rows, 3, generator=draw),
    )


def learnt(seed: int = 0) -> Scorer:
    data = acts(seed=seed)
    reference = Reference.from_arrays(data.layers, data.logits)
    return Scorer.learn(Gram(), reference, model="digits", version="7")


def test_a_file_brings_back_everything(tmp_path: Path) -> None:
    scorer = learnt()
    path = tmp_path / "gram.safetensors"
    scorer.save(path)
    loaded = Scorer.load(path)
    assert loaded.detector == Gram(layers=("early", "late"))
    assert (loaded.model, loaded.version, loaded.digest) == ("digits", "7", scorer.digest)
    assert torch.equal(loaded.score(acts(9, 1)), scorer.score(acts(9, 1)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["gram.safetensors"]
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["schema"] == "oodmon.scorer/1"
    assert header["name"] == "gram"
    assert json.loads(header["options"])["layers"] == ["early", "late"]


def test_a_detector_without_state_is_stored_too(tmp_path: Path) -> None:
    scorer = Scorer(MSP(temperature=2.0), {})
    scorer.save(tmp_path / "msp")
    assert Scorer.load(tmp_path / "msp").digest == scorer.digest


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    learnt().save(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        learnt(1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_the_digest_names_options_and_state() -> None:
    first = learnt()
    assert first.digest == learnt().digest
    assert len(first.digest) == 16
    assert first.digest != learnt(1).digest
    assert Scorer(MSP(), {}).digest != Scorer(MSP(temperature=2.0), {}).digest
    changed = {**first.state, "weight": first.state["weight"] + 1.0}
    assert Scorer(first.detector, changed).digest != first.digest
    assert first.to("meta").digest == first.digest


def test_the_digest_names_the_weights_too_where_they_are_known(tmp_path: Path) -> None:
    first = learnt()
    known = Scorer(first.detector, first.state, "m", "1", "1.some.weights")
    other = Scorer(first.detector, first.state, "m", "1", "1.other.weights")
    assert len({first.digest, known.digest, other.digest}) == 3
    # as without them: files that do not say which weights keep their digests
    assert Scorer(MSP(), {}).digest == Scorer(MSP(), {}, "m", "1").digest == "89442e01904aebd7"
    assert known.to("meta").weights == "1.some.weights"
    known.save(tmp_path / "known")
    loaded = Scorer.load(tmp_path / "known")
    assert (loaded.weights, loaded.digest) == (known.weights, known.digest)
    assert made_for(tmp_path / "known") == ("m", "1", "1.some.weights")
    first.save(tmp_path / "first")
    with safetensors.safe_open(tmp_path / "first", "pt") as file:
        assert "weights" not in file.metadata()
    assert Scorer.load(tmp_path / "first").weights == made_for(tmp_path / "first")[2] == ""


def rewritten(path: Path, **metadata: str) -> None:
    """The file with other metadata."""
    with safetensors.safe_open(path, "pt") as file:
        header = {**file.metadata(), **metadata}
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), header))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schema": "oodmon.scorer/2"}, "expected 'oodmon.scorer/1', found 'oodmon.scorer/2'"),
        ({"name": "grim"}, "did you mean `gram`"),
        ({"options": '{"powerz": [1]}'}, "powerz: unknown option"),
        ({"options": "{"}, "Expecting property name"),
        ({"options": '{"layers": ["early"]}'}, "state: expected"),
        ({"digest": "0123456789abcdef"}, "was changed after it was written"),
        ({"weights": "1.other"}, "was changed after it was written"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "state"
    learnt().save(path)
    rewritten(path, **metadata)
    with pytest.raises(StateError, match="state") as caught:
        Scorer.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (struct.pack("<Q", 1 << 40) + b"{}", "announced"),
        (struct.pack("<Q", 2) + b"[]", "expected an object"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"{}", "schema"),
        (struct.pack("<Q", 24) + b'{"__metadata__": "hello"}'[:24], "not JSON"),
        (struct.pack("<Q", 21) + b'{"__metadata__": 17 }', "map names to strings"),
        (struct.pack("<Q", 4000) + b"[" * 4000, "header"),
    ],
)
def test_bytes_that_are_no_scorer_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(StateError, match="state") as caught:
        Scorer.load(path)
    assert message in str(caught.value)


def test_a_missing_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        Scorer.load(tmp_path / "nothing")
    path = tmp_path / "state"
    learnt().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StateError, match="damaged"):
        Scorer.load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    learnt().save(path)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StateError, match="digest"):
        Scorer.load(path)


def test_open_layers_are_pinned() -> None:
    data = acts()
    reference = Reference.from_arrays(data.layers, data.logits)
    assert Scorer.learn(Gram(), reference).reads().layers == ("early", "late")
    assert Scorer.learn(RND(epochs=1), reference).reads().layers == ("late",)
    assert Scorer.learn(RND(layer="early", epochs=1), reference).reads().layers == ("early",)
    with pytest.raises(ContractError, match="no layer was tapped"):
        Scorer.learn(Gram(), Reference.from_arrays(logits=data.logits))


def test_a_score_of_the_wrong_shape_is_an_error() -> None:
    class Wide(MSP):
        def score(self, acts: Activations, state: object) -> torch.Tensor:
            return acts.require_logits()

    with pytest.raises(ContractError, match=r"expected scores \(4,\), found \(4, 3\)"):
        Scorer(Wide(), {}).score(acts(4))


def test_state_cannot_be_replaced() -> None:
    scorer = learnt()
    with pytest.raises(TypeError):
        scorer.state["weight"] = torch.zeros(2)  # type: ignore[index]


def test_arrays_of_different_length_are_named() -> None:
    with pytest.raises(ContractError, match=r"labels has shape \(3,\), others have 4 rows"):
        Reference.from_arrays(logits=np.zeros((4, 2), np.float32), labels=np.zeros(3))
    with pytest.raises(ContractError, match="none were given"):
        Reference.from_arrays()
    with pytest.raises(ContractError, match="batch_size"):
        Reference.from_arrays(logits=np.zeros((4, 2), np.float32), batch_size=0)


def test_a_reference_passes_again_in_the_same_order() -> None:
    logits = np.arange(20, dtype=np.float32).reshape(10, 2)
    reference = Reference.from_arrays(
        logits=logits, labels=np.arange(10), head=(np.eye(2), np.zeros(2)), batch_size=4
    )
    for _ in range(2):
        batches = list(reference)
        assert [batch.rows for batch in batches] == [4, 4, 2]
        joined = torch.cat([batch.require_logits() for batch in batches])
        assert torch.equal(joined, torch.from_numpy(logits))
        assert batches[0].labels is not None
        assert batches[0].labels.dtype == torch.int64
    assert reference.head is not None
    assert torch.equal(reference.head[0], torch.eye(2, dtype=torch.float64))
    draws = [torch.rand(3, generator=reference.generator()) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])


def test_batches_are_made_anew_for_each_pass() -> None:
    passes = []

    def batches() -> Iterator[Activations]:
        passes.append(1)
        yield acts(3).__class__(logits=torch.zeros(3, 2, requires_grad=True))

    reference = Reference.from_batches(batches, seed=4)
    assert [batch.require_logits().requires_grad for batch in reference] == [False]
    list(reference)
    assert len(passes) == 2


def test_progress_stays_within_bounds() -> None:
    said: list[tuple[float, str]] = []
    reference = Reference.from_arrays(
        logits=np.zeros((1, 2), np.float32), progress=lambda done, note: said.append((done, note))
    )
    reference.progress(1.7, "over")
    reference.progress(-1.0, "under")
    assert said == [(1.0, "over"), (0.0, "under")]


def test_gather_keeps_a_fair_bounded_sample() -> None:
    logits = torch.arange(10_000, dtype=torch.float32)[:, None].repeat(1, 2)
    logits[5] = float("nan")
    reference = Reference.from_arrays(logits=logits, batch_size=100)
    (sample,) = gather(reference, lambda batch: (batch.require_logits(),), 1000)
    values = sample[:, 0]
    assert len(values) == 1000
    assert bool((values.diff() > 0).all())
    # uniform on 0..9999: mean 4999.5, standard error 91
    assert abs(float(values.mean()) - 4999.5) < 5 * 91
    (whole,) = gather(reference, lambda batch: (batch.require_logits(),), 20_000)
    assert len(whole) == 9_999
    empty = Reference.from_arrays(logits=torch.full((4, 2), float("nan")))
    with pytest.raises(ContractError, match="no row that is finite"):
        gather(empty, lambda batch: (batch.require_logits(),), 10)

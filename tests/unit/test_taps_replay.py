"""Replays from files, and reading a reference through a tap."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oodmon.contracts import Reads
from oodmon.errors import ContractError
from oodmon.taps.collect import collect
from oodmon.taps.hooks import Hooks
from oodmon.taps.replay import Replay
from tests.agents import Norm, Recording, attach
from tests.nets import Wrapped, build, images

READS = Reads(layers=("penultimate",), logits=True)


def recording(path: Path, rows: int = 10, **more: Any) -> Path:
    arrays = {
        "layers.penultimate": torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 4),
        "logits": torch.eye(rows, 3),
    } | more
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})
    else:
        save_file(arrays, path)
    return path


@pytest.mark.parametrize("name", ["acts.npz", "acts.safetensors"])
def test_a_recording_is_scored_whole_and_in_order(tmp_path: Path, name: str) -> None:
    path, feed = recording(tmp_path / name), Recording()
    tap = Replay(path=str(path), batch_rows=3)
    agent = attach(torch.nn.Identity(), feed, tap=tap)
    replaying: Any = agent._attached
    assert replaying.play() == 10
    assert agent.detach()
    scores = np.concatenate([batch.scores["norm"] for batch in feed.batches])
    features = torch.arange(40, dtype=torch.float32).reshape(10, 4)
    assert np.array_equal(scores, features.square().sum(dim=1).numpy())
    assert agent.stats().dropped == 0


def test_a_long_recording_waits_for_room_instead_of_shedding(tmp_path: Path) -> None:
    path, feed = recording(tmp_path / "acts.npz", rows=2000), Recording()
    slow = Norm(before=lambda _acts: threading.Event().wait(0.001))
    agent = attach(
        torch.nn.Identity(), feed, {"norm": slow}, tap=Replay(path=str(path), batch_rows=5)
    )
    replaying: Any = agent._attached
    assert replaying.play() == 2000
    agent.detach()
    assert (feed.rows, agent.stats().dropped) == (2000, 0)


@pytest.mark.parametrize(
    ("reads", "more", "message"),
    [
        (Reads(layers=("stage1",)), {}, "layer 'stage1' was not tapped; tapped layers: penult"),
        (Reads(inputs=True), {}, "inputs were not tapped"),
        (READS, {"layers.x": torch.zeros(9, 2)}, r"layers.x: expected 10 rows, found shape \(9, 2"),
    ],
)
def test_what_a_file_lacks_is_named_when_attached(
    tmp_path: Path, reads: Reads, more: dict[str, Any], message: str
) -> None:
    path = recording(tmp_path / "acts.npz", **more)
    with pytest.raises(ContractError, match=message):
        Replay(path=str(path)).attach(torch.nn.Identity(), reads, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"no array file", b"\x80\x04]."])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("acts.npz", "acts.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ContractError, match="acts"):
            Replay(path=str(path)).attach(torch.nn.Identity(), READS, None)  # type: ignore[arg-type]
    gone = Replay(path=str(tmp_path / "gone.npz"))
    with pytest.raises(ContractError, match="gone"):
        gone.attach(torch.nn.Identity(), READS, None)  # type: ignore[arg-type]


def test_a_reference_is_read_through_the_model() -> None:
    model = build("resnet")
    labels = torch.arange(4)
    batches = [(images(seed=n), labels) for n in range(3)]
    acts = list(
        collect(model, Hooks(), Reads(layers=("stage1", "penultimate"), logits=True), batches)
    )
    assert len(acts) == 3
    assert torch.equal(acts[2].require_logits(), model(images(seed=2)))
    assert acts[0].labels is not None
    assert torch.equal(acts[0].labels, labels)
    assert not model._forward_hooks


def test_what_cannot_be_read_of_a_reference_is_an_error() -> None:
    conv = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(ContractError, match=r"logits: expected a floating \(B, C\), found"):
        list(collect(conv, Hooks(), Reads(logits=True), [(images(), None)]))
    assert not conv._forward_hooks
    unused = build("cnn")
    unused.add_module("never", torch.nn.Linear(2, 2))
    with pytest.raises(ContractError, match="'never': expected to run"):
        list(collect(unused, Hooks(), Reads(layers=("never",), logits=True), [(images(), None)]))


def test_inputs_may_be_tuples_or_named() -> None:
    model = Wrapped("dict").eval()
    for inputs in ((images(),), {"x": images()}):
        (acts,) = collect(model, Hooks(), Reads(logits=True), [(inputs, None)])
        assert acts.rows == 4

"""Compiled models: what works, as docs/taps.md says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tests.agents import Norm, Recording, attach
from tests.nets import build, images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def outer(model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    compiled = torch.compile(model, backend="eager")
    return compiled, lambda: compiled(images())  # type: ignore[return-value]


def before(model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    return model, lambda: torch.compile(model, backend="eager")(images())


def in_place(model: nn.Module) -> tuple[nn.Module, Callable[[], object]]:
    model.compile(backend="eager")
    return model, lambda: model(images())


@pytest.mark.parametrize("way", [outer, before, in_place], ids=lambda way: way.__name__)
def test_a_compiled_model_is_read_when_attached_before_its_first_pass(
    way: Callable[[nn.Module], tuple[nn.Module, Callable[[], object]]],
) -> None:
    torch.compiler.reset()
    plain, feed, alone = build("mlp"), Recording(), Recording()
    with attach(plain, alone), torch.no_grad():
        plain(images())
    target, run = way(build("mlp"))
    with attach(target, feed, {"norm": Norm()}), torch.no_grad():
        run()
        run()
    assert feed.rows == 8
    scores = np.concatenate([batch.scores["norm"] for batch in feed.batches])
    np.testing.assert_allclose(scores[:4], alone.batches[0].scores["norm"], rtol=1e-5)
    np.testing.assert_allclose(scores[4:], scores[:4], rtol=1e-5)


def test_attaching_after_the_first_pass_is_told_as_a_limit() -> None:
    torch.compiler.reset()
    compiled = torch.compile(build("mlp"), backend="eager")
    with torch.no_grad():
        compiled(images())
    with attach(compiled, Recording()) as agent:  # type: ignore[arg-type]
        assert any("attach before its first pass" in line for line in agent.found)

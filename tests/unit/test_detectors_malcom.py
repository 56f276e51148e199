"""Phrases, scans and levels of `malcom` against plain definitions, and what compression adds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from oodmon.detectors import Reference, Scorer, phrases  # noqa: E402
from oodmon.detectors.malcom import Malcom, _levels, _strings, _typical  # noqa: E402
from oodmon.detectors.phrases import Tries, compression_distance, hilbert_order  # noqa: E402
from oodmon.errors import ContractError, StateError  # noqa: E402
from oodmon.evaluate import auroc  # noqa: E402
from oodmon.records import Activations  # noqa: E402


def counted(symbols: list[int]) -> int:
    """Phrases of one string by the definition, with a set."""
    known: set[tuple[int, ...]] = set()
    phrase: tuple[int, ...] = ()
    for symbol in symbols:
        phrase = (*phrase, symbol)
        if phrase not in known:
            known.add(phrase)
            phrase = ()
    return 1 + len(known)


def random(*shape: int, seed: int = 0) -> Tensor:
    drawn: Tensor = torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))
    return drawn


def test_a_string_of_one_symbol_has_phrases_of_each_length() -> None:
    strings = torch.zeros((1, 64), dtype=torch.int64)
    assert int(Tries(1, 64, strings.device).read(strings)) == 11


@pytest.mark.parametrize("length", [1, 2, 5, 49, 200])
def test_distances_are_those_of_the_definition(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strings, others = random(4, 3, length), random(3, length, seed=1)
    strings[0] = 2
    strings[1, 1] = others[1]
    found = compression_distance(strings, others)
    assert found.shape == (4, 3)
    for row in range(4):
        for channel in range(3):
            u, v = strings[row, channel].tolist(), others[channel].tolist()
            alone = counted(u), counted(v)
            joint = min(counted(u + v), counted(v + u))
            assert float(found[row, channel]) == pytest.approx(
                (joint - min(alone)) / max(alone), abs=1e-6
            )
    monkeypatch.setattr(phrases, "_TABLE_BYTES", 1)
    assert torch.equal(compression_distance(strings, others), found), "in parts of one row"


@pytest.mark.parametrize(("length", "same", "other"), [(49, 0.671, 0.701), (196, 0.739, 0.752)])
def test_the_distance_is_symmetric_and_smaller_to_itself(
    length: int, same: float, other: float
) -> None:
    u, v = random(200, length, seed=2), random(200, length, seed=3)
    there, back = compression_distance(u[None], v), compression_distance(v[None], u)
    assert torch.equal(there, back)
    itself = compression_distance(u[None], u)
    assert float(itself.mean()) == pytest.approx(same, abs=0.01)
    assert float(there.mean()) == pytest.approx(other, abs=0.01)
    assert float(itself.mean()) < float(there.mean())


def test_no_string_can_overflow_its_trie() -> None:
    """The string with the most phrases there can be: all of one symbol, then all of two, …"""
    for size in (1, 2, 3, 4):
        words = [
            [int(digit) for digit in np.base_repr(number, 4).zfill(width)]
            for width in range(1, size + 1)
            for number in range(4**width)
        ]
        symbols = [symbol for word in words for symbol in word]
        assert counted(symbols) == 1 + len(words)
        for extra in (symbols, [*symbols, 0], symbols[:-1]):
            tries = Tries(1, len(extra), torch.device("cpu"))
            assert int(tries.read(torch.tensor([extra]))) == counted(extra)


def test_the_scan_visits_each_place_once_and_steps_to_a_neighbour() -> None:
    order = hilbert_order(8, 8)
    assert sorted(order) == list(range(64))
    steps = [abs(a // 8 - b // 8) + abs(a % 8 - b % 8) for a, b in itertools.pairwise(order)]
    assert set(steps) == {1}
    for height, width in ((7, 7), (5, 9), (1, 6), (6, 1)):
        assert sorted(hilbert_order(height, width)) == list(range(height * width))
    assert hilbert_order(1, 6) == (0, 1, 2, 3, 4, 5)


def test_levels_are_a_quantiser_that_cannot_be_improved_much() -> None:
    draw = torch.Generator().manual_seed(0)
    cells = torch.randn((1, 2, 4000), generator=draw)
    cells[0, 1] = cells[0, 1].relu() * 10.0  # half of it is one value
    thresholds = _levels(cells)
    # Max, IRE Transactions 1960: the four levels of a Gaussian part at 0 and 0.982
    assert thresholds[0].tolist() == pytest.approx([-0.982, 0.0, 0.982], abs=0.1)
    strings = _strings(cells, thresholds)
    assert set(strings.flatten().tolist()) == {0, 1, 2, 3}
    assert (strings[0, 1][cells[0, 1] == 0.0] == 0).all()
    constant = _levels(torch.full((1, 1, 50), 3.0))
    assert _strings(torch.full((1, 1, 5), 3.0), constant).eq(0).all()


def test_the_typical_map_has_each_level_as_often_as_the_reference() -> None:
    strings = torch.tensor([[[0] * 50 + [1] * 25 + [2] * 15 + [3] * 10]])
    mean = torch.linspace(5.0, -5.0, 20)[None]
    typical = _typical(mean, strings)
    assert torch.bincount(typical[0], minlength=4).tolist() == [10, 5, 3, 2]
    assert typical[0].tolist() == sorted(typical[0].tolist(), reverse=True)


def stripes(rows: int, seed: int) -> Tensor:
    """Maps (rows, 6, 8, 8) with one pattern per channel under noise."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.arange(64).reshape(8, 8)
    patterns = torch.stack([((places + shift) % 8 < 4).float() for shift in range(6)])
    made: Tensor = patterns + 0.1 * torch.rand((rows, 6, 8, 8), generator=draw)
    return made


def test_compression_sees_what_averages_cannot() -> None:
    """The same values in other places: every channel's mean is as it was."""
    reference = Reference.from_arrays({"maps": stripes(300, 0)}, labels=torch.zeros(300).long())
    inside = stripes(100, 1)
    draw = torch.Generator().manual_seed(2)
    shuffled = torch.rand((100, 6, 64), generator=draw).argsort(dim=2)
    outside = stripes(100, 3).flatten(2).gather(2, shuffled).reshape(100, 6, 8, 8)

    def seen(**options: object) -> float:
        scorer = Scorer.learn(Malcom(layers=("maps",), **options), reference)  # type: ignore[arg-type]
        ids, oods = (
            scorer.score(Activations({"maps": maps})).numpy() for maps in (inside, outside)
        )
        return auroc(ids, oods)

    assert seen() > 0.99
    assert seen(scan="rows") > 0.8, "rows of stripes are cut where they end"
    assert seen(compression=False) < 0.65


def test_dead_channels_count_for_nothing_and_tokens_are_strings() -> None:
    maps = stripes(100, 0)
    maps[:, 2] = 0.0
    scorer = Scorer.learn(
        Malcom(layers=("maps",)),
        Reference.from_arrays({"maps": maps}, labels=torch.zeros(100).long()),
    )
    whole = scorer.score(Activations({"maps": maps}))
    assert whole.isfinite().all()
    assert scorer.state["whitener"][2].eq(0.0).all()
    tokens = maps.flatten(2).transpose(1, 2)
    by_row = Scorer.learn(
        Malcom(layers=("maps",), scan="rows"),
        Reference.from_arrays({"maps": maps}, labels=torch.zeros(100).long()),
    )
    as_tokens = Scorer.learn(
        Malcom(layers=("maps",)),
        Reference.from_arrays({"maps": tokens}, labels=torch.zeros(100).long()),
    )
    for name, tensor in by_row.state.items():
        torch.testing.assert_close(as_tokens.state[name], tensor, rtol=1e-3, atol=1e-3)


def test_other_sizes_and_states_are_refused() -> None:
    labels = torch.zeros(50).long()
    reference = Reference.from_arrays({"maps": stripes(50, 0)}, labels=labels)
    scorer = Scorer.learn(Malcom(layers=("maps",)), reference)
    with pytest.raises(ContractError, match=r"learnt from 6 channels of 64 places, found \(6, 4"):
        scorer.score(Activations({"maps": torch.zeros(2, 6, 4, 4)}))
    with pytest.raises(StateError, match="malcom: state: expected float32 thresholds"):
        Scorer(scorer.detector, {**scorer.state, "typical.0": torch.zeros(5, 64)})
    with pytest.raises(ContractError, match=r"detectors\.malcom\.scan: 'spiral' is none of"):
        Malcom(scan="spiral")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="no layer was tapped"):
        Scorer.learn(Malcom(), Reference.from_arrays(logits=torch.zeros(4, 2), labels=labels[:4]))
    nothing = torch.full((4, 6, 8, 8), float("nan"))
    with pytest.raises(ContractError, match="holds no finite row"):
        Scorer.learn(
            Malcom(layers=("maps",)), Reference.from_arrays({"maps": nothing}, labels=labels[:4])
        )

"""Fitting: disjoint shares, one pass, the model left as it was, any kind of data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from oodmon.calibration import Calibration  # noqa: E402
from oodmon.contexts import Context  # noqa: E402
from oodmon.errors import ContractError  # noqa: E402
from oodmon.fitting import fit, shares  # noqa: E402
from oodmon.fitting.measure import measure  # noqa: E402
from oodmon.fitting.sources import Source, from_data, from_images, from_npz  # noqa: E402
from oodmon.registry import detectors, taps  # noqa: E402

ROWS = 200


class Net(nn.Module):
    """Takes a scale by name; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(8, 3)
        self.passes = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.passes += 1
        out: Tensor = self.fc(self.body(x if scale is None else x * scale))
        return out


def arrays() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 4, generator=draw), torch.arange(ROWS) % 3


def run(model: nn.Module, source: Source, **options: Any) -> Any:
    named = options.pop("detectors", {"msp": detectors.create("msp")})
    return fit(
        model,
        source,
        tap=taps.create("hooks"),
        detectors=named,
        model_name="net",
        version="1",
        **options,
    )


def test_the_model_runs_once_per_batch_and_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Net()
    model.body[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    source = from_data(arrays(), batch_size=50, seed=0)
    fitting = run(model, source, detectors={n: detectors.create(n) for n in ("msp", "energy")})
    assert model.passes == 4
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert fitting.learnt + fitting.calibrated == ROWS
    assert len(fitting.detectors["msp"].calibration.scores) == fitting.calibrated


def test_shares_are_disjoint_seeded_and_survive_the_move_to_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oodmon.records import Activations

    inputs, labels = arrays()
    kept = []
    for limit, name in ((1 << 30, "memory"), (600, "files")):
        monkeypatch.setattr(shares, "_MEMORY_BYTES", limit)
        folder = tmp_path / name
        folder.mkdir()
        both = shares.Shares(folder, 0.3, seed=5)
        for rows in torch.arange(ROWS).split(20):
            both.add(Activations(layers={"a.b": inputs[rows]}, labels=labels[rows]))
        parts = [
            torch.cat([acts.layers["a.b"] for acts in share.batches()])
            for share in (both.learn, both.calibrate)
        ]
        together = {tuple(row) for row in torch.cat(parts).tolist()}
        assert together == {tuple(row) for row in inputs.tolist()}
        assert sum(map(len, parts)) == ROWS
        assert 0.2 < len(parts[0]) / ROWS < 0.4
        kept.append(parts)
    assert list((tmp_path / "files").rglob("*.safetensors"))
    assert not list((tmp_path / "memory").iterdir())
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(*arrays(), strict=True))


@pytest.mark.parametrize(
    "data",
    [
        arrays(),
        tuple(part.numpy() for part in arrays()),
        (arrays()[0].double().numpy(), None),
        arrays()[0].numpy(),
        TensorDataset(*arrays()),
        DataLoader(TensorDataset(*arrays()), batch_size=32),
        Stream(),
        [arrays()],
        [{"x": arrays()[0], "scale": torch.ones(ROWS, 1), "labels": arrays()[1]}],
        [((arrays()[0], torch.ones(ROWS, 1)), arrays()[1])],
    ],
    ids=lambda data: type(data).__name__,
)
def test_any_kind_of_data_set(data: Any) -> None:
    torch.manual_seed(0)
    fitting = run(Net(), from_data(data, batch_size=64, seed=0))
    assert fitting.learnt + fitting.calibrated == ROWS


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (iter([arrays()]), "an iterator, which one pass uses up"),
        (3, "expected arrays .* found int"),
        ((arrays()[0], arrays()[1][:5]), "200 inputs, but 5 labels"),
        ((arrays()[0], arrays()[0]), r"labels: expected whole numbers \(B,\)"),
        ([(arrays()[0], arrays()[1][:5])], "a batch of 200 inputs and 5 labels gave 200 rows"),
        ((arrays()[0][:2], None), "too few; at least 2 of each"),
    ],
)
def test_data_that_cannot_be_used(data: Any, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        run(Net(), from_data(data, batch_size=64, seed=0))


def test_rows_that_cannot_be_scored_are_left_out_and_counted() -> None:
    inputs, labels = arrays()
    inputs[::4] = float("nan")
    fitted = run(Net(), from_data((inputs, labels), batch_size=64, seed=0)).detectors["msp"]
    assert fitted.invalid > 0
    assert not np.isnan(fitted.calibration.scores).any()
    with pytest.raises(ContractError, match="could score 0 of"):
        run(Net(), from_data((inputs * float("nan"), labels), batch_size=64, seed=0))


def test_npz_rows_of_unknown_class_are_left_out(tmp_path: Path) -> None:
    images = np.full((6, 2, 3), 255, np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, -1, -2, 0, 1, -3]))
    (batch,) = from_npz(tmp_path / "a.npz", batch_size=8, seed=0).batches()
    assert batch.arguments[0].shape == (4, 1, 2, 3)
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [-1, 0, 0, 1]
    assert float(batch.arguments[0].max()) == 1.0
    np.savez(tmp_path / "b.npz", images=np.zeros((6, 5, 7, 3), np.uint8))
    (batch,) = from_npz(tmp_path / "b.npz", batch_size=8, seed=0).batches()
    assert batch.arguments[0].shape == (6, 3, 5, 7)
    np.savez(tmp_path / "c.npz", pictures=images)
    with pytest.raises(ContractError, match="expected an array called inputs or images or x"):
        from_npz(tmp_path / "c.npz", batch_size=8, seed=0)
    (tmp_path / "d.npz").write_bytes(b"no archive")
    with pytest.raises(ContractError, match=r"not a readable \.npz file"):
        from_npz(tmp_path / "d.npz", batch_size=8, seed=0)


def test_unlabelled_rows_are_all_taken(tmp_path: Path) -> None:
    images = np.full((6, 2, 3), 255, np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, -1, 0, 1, -1]))
    (batch,) = from_npz(tmp_path / "a.npz", batch_size=8, seed=0, labelled=False).batches()
    assert batch.arguments[0].shape == (6, 1, 2, 3)
    assert batch.labels is None
    with pytest.raises(ContractError, match="there is no image in it"):
        from_images(tmp_path, batch_size=8, seed=0, labelled=False)


def test_measuring_scores_every_sample_and_leaves_the_model_as_it_was() -> None:
    inputs, labels = arrays()
    model = Net().train()
    source = from_data((inputs, labels), batch_size=64, seed=0)
    fitting = run(
        model, source, detectors={n: detectors.create(n) for n in ("energy", "mahalanobis")}
    )
    scorers = {name: fitted.scorer for name, fitted in fitting.detectors.items()}
    spoilt = inputs.clone()
    spoilt[5] = float("nan")
    told: list[tuple[str, float]] = []
    loader = [spoilt[start : start + 7] for start in range(0, len(spoilt), 7)]
    found = measure(
        model,
        from_data(loader, batch_size=1, seed=0),
        tap=taps.create("hooks"),
        scorers=scorers,
        progress=lambda stage, share, _: told.append((stage, share)),
        stage="spoilt",
    )
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert {stage for stage, _ in told} == {"spoilt"}
    for scores in found.values():
        assert scores.dtype == np.float32
        assert np.flatnonzero(np.isnan(scores)).tolist() == [5]
    whole = measure(
        model, from_data([inputs], batch_size=1, seed=0), tap=taps.create("hooks"), scorers=scorers
    )
    for name, scores in whole.items():
        np.testing.assert_allclose(np.delete(found[name], 5), np.delete(scores, 5), rtol=1e-4)
    with pytest.raises(ContractError, match="there is no sample in it"):
        measure(
            model, from_data([], batch_size=1, seed=0), tap=taps.create("hooks"), scorers=scorers
        )


TIMES = 1_700_000_000_000_000_000 + 3_600_000_000_000 * np.arange(ROWS)


def _placed(**said: Any) -> dict[str, Any]:
    named = np.where(np.arange(ROWS) % 2 == 0, "even", "odd")
    return {"times": TIMES, "segments": named} | said


def _npz(folder: Path, said: dict[str, Any]) -> Source:
    inputs, labels = arrays()
    path = folder / "reference.npz"
    np.savez(path, inputs=inputs.numpy(), labels=labels.numpy(), **said)
    return from_npz(path, batch_size=64, seed=0)


@pytest.mark.parametrize("kind", ["npz", "arrays", "loader"])
def test_when_and_where_samples_were_seen_goes_into_the_calibration(
    kind: str, tmp_path: Path
) -> None:
    inputs, labels = arrays()
    labels = labels.clone()
    # Each sample's score tells which it is.
    inputs = torch.arange(float(ROWS))[:, None] * torch.ones(1, inputs.shape[1])
    labels[:20] = -1
    said = _placed()
    if kind == "npz":
        said["times"] = TIMES.astype("datetime64[ns]").astype("datetime64[s]")
        np.savez(tmp_path / "r.npz", inputs=inputs.numpy(), labels=labels.numpy(), **said)
        source = from_npz(tmp_path / "r.npz", batch_size=64, seed=0)
    elif kind == "arrays":
        source = from_data((inputs, labels, said), batch_size=64, seed=0)
    else:
        batches = [
            (
                inputs[at : at + 50],
                labels[at : at + 50],
                {
                    "times": torch.from_numpy(TIMES[at : at + 50]),
                    "segments": list(said["segments"][at : at + 50]),
                },
            )
            for at in range(0, ROWS, 50)
        ]
        source = from_data(batches, batch_size=64, seed=0)
    head = nn.Linear(4, 3)
    model = nn.Sequential(nn.Identity(), head)
    with torch.no_grad():
        head.weight.zero_()[0] = 1.0
        head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    fitted = run(
        model,
        source,
        detectors={"max": detectors.create("max_logit")},
        context=Context(("hour", "segment")),
    )
    calibration = fitted.detectors["max"].calibration
    assert len(calibration) == fitted.calibrated < ROWS - 20
    rows = np.rint((-calibration.scores - 1.0) / 4.0).astype(int)
    assert rows.min() >= 20, "known outliers are no reference"
    np.testing.assert_array_equal(calibration.times, TIMES[rows])
    names = np.array(calibration.segments)[calibration.segment]
    np.testing.assert_array_equal(names, said["segments"][rows])
    # Class 0 is what this model always answers.
    assert calibration.labelled == fitted.calibrated
    assert calibration.wrong == int((labels.numpy()[rows] != 0).sum())
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.fingerprint == calibration.fingerprint
    assert (again.labelled, again.wrong, again.segments) == (
        calibration.labelled,
        calibration.wrong,
        ("even", "odd"),
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"times": TIMES[:9]}, rf"{ROWS} samples, but times of shape \(9,\)"),
        ({"times": TIMES / 1e9}, "found float64"),
        ({"times": TIMES // 1_000_000_000}, "no time in nanoseconds"),
        ({"times": np.full(ROWS, "NaT", "datetime64[s]")}, "NaT"),
        ({"segments": np.zeros(ROWS)}, "segments: expected names, found float64"),
    ],
)
def test_times_and_segments_that_are_none(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match=message):
        _npz(tmp_path, _placed(**said))


def test_what_ranks_within_a_context_need_is_named_before_anything_is_learnt(
    tmp_path: Path,
) -> None:
    inputs, labels = arrays()
    model = Net()
    only = {"segments": _placed()["segments"]}
    with pytest.raises(ContractError, match=r"context is hour.*reference\.npz.*`times`"):
        run(model, _npz(tmp_path, only), context=Context(("hour",)))
    half = [(inputs[:50], labels[:50], {"times": TIMES[:50]}), (inputs[50:100], labels[50:100])]
    with pytest.raises(ContractError, match="1 of 2 batches do not say the times"):
        run(model, from_data(half, batch_size=64, seed=0))


def test_what_a_score_measures_goes_into_its_calibration() -> None:
    torch.manual_seed(0)
    model = Net()
    named = {n: detectors.create(n) for n in ("msp", "expected_error")}
    fitting = run(model, from_data(arrays(), batch_size=50, seed=0), detectors=named)
    assert fitting.detectors["msp"].calibration.measures == ""
    made = fitting.detectors["expected_error"].calibration
    assert made.measures == "expected_error"
    # A network that knows nothing of three classes, and an estimate that says so.
    known = made.reference().histogram("expected_error")
    assert known.judged == fitting.calibrated
    assert known.accuracy == pytest.approx(fitting.accuracy, abs=0.1)

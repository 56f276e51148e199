"""Published weights, in a reduced form: they are loaded right, and our detectors see no less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from examples import published_networks as networks  # noqa: E402
from examples import published_weights as example  # noqa: E402
from tests.data import data_path  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def folder() -> Path:
    data_path("cifar10_train10k.npz")
    return data_path("weights").parent


@pytest.mark.parametrize(("name", "right"), [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_the_networks_are_as_right_as_published(name: str, right: float) -> None:
    path = data_path(f"weights/cifar10_{name}_akamaster.safetensors")
    model = networks.load_resnet(path, example.RESNETS[name])
    rows = slice(1000)
    pictures = example.images(folder(), "cifar10_test", rows)
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(dim=1) for part in torch.split(pictures, 250)])
    found = float((answers == example.labels(folder(), "cifar10_test", rows)).float().mean())
    # three standard errors of a share of 1,000
    assert found == pytest.approx(right, abs=0.027)


def test_a_small_run_sees_no_less_than_the_peer(tmp_path: Path) -> None:
    status = example.main(
        [
            f"--data={folder()}",
            "--networks",
            "resnet20",
            "--rows=500",
            "--learn=2000",
            f"--json={tmp_path / 'table.json'}",
        ]
    )
    assert status == 0
    table = json.loads((tmp_path / "table.json").read_text())
    found = {(row["detector"], row["data"]): row["ours"]["auroc"] for row in table["lines"]}
    # the data set's own notes have 0.886 and 0.864 on all of the images
    assert found["msp", "SVHN"] == pytest.approx(0.886, abs=0.02)
    assert found["energy", "SVHN"] == pytest.approx(0.864, abs=0.025)
    for data in ("CIFAR-100", "GTSRB", "SVHN", "blurred", "noisy"):
        assert found["cosine", data] > 0.8
    before = {row["data"]: row["before"] for row in table["exposure"]}
    after = {row["data"]: row["after"] for row in table["exposure"]}
    assert set(before) == {"notmnist", "kmnist", "fashion_mnist", "multi30k", "wmt16"}
    assert all(after[data] > before[data] for data in before)
    assert after["wmt16"] > 0.95
    assert before["wmt16"] < 0.85

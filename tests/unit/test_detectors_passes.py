"""ODIN, GradNorm, MC dropout and ensembles: the numbers of their papers, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.committee import disagreement
from oodmon.detectors.odin import stepped
from oodmon.errors import ContractError, StateError
from oodmon.recipes.deconf import DeConf, DeConfHead
from oodmon.records import Activations
from oodmon.registry import detectors
from oodmon.taps.twin import Twin
from tests.nets import build, images


def acts_of(model: nn.Module, rows: int = 12, seed: int = 0) -> Activations:
    inputs = images(rows, seed)
    with torch.no_grad():
        logits = model(inputs)
    return Activations(logits=logits, inputs=inputs, probe=Twin(model))


def scored(name: str, acts: Activations, **options: object) -> Tensor:
    return Scorer(detectors.create(name, **options), {}).score(acts)


def test_odin_is_msp_where_nothing_is_cooled_or_moved() -> None:
    acts = acts_of(build("resnet"))
    assert torch.equal(scored("odin", acts, temperature=1.0, epsilon=0.0), scored("msp", acts))
    reads = detectors.create("odin", epsilon=0.0).reads()
    assert (reads.model, reads.inputs) == (False, False), "no pass is needed, so it sits at the tap"


@pytest.mark.parametrize("temperature", [2.0, 1000.0])
def test_odin_orders_as_the_formula_in_float64(temperature: float) -> None:
    model = build("mlp").double()
    inputs = images(200).double()
    leaf = inputs.clone().requires_grad_()
    log_p = (model(leaf) / temperature).log_softmax(dim=1).amax(dim=1)
    log_p.sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        moved = model(inputs + 0.01 * leaf.grad.sign())
        expected = -(moved / temperature).softmax(dim=1).amax(dim=1)
    acts = Activations(logits=model(inputs).detach(), inputs=inputs, probe=Twin(model))
    found = scored("odin", acts, temperature=temperature, epsilon=0.01)
    uniform = math.log1p(-1 / 5)
    exact = uniform + temperature * (torch.log1p(expected) - uniform)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)
    assert len(set(found.tolist())) == 200, "no ties at a high temperature"


def test_odin_moves_towards_the_predicted_class_by_epsilon_over_the_scale() -> None:
    inputs, slope = torch.zeros(2, 2, 3), torch.ones(2, 2, 3)
    slope[:, :, 0] = 0.0
    found = stepped(inputs, -slope, 0.01, (1.0, 4.0))
    assert found[0].tolist() == [
        pytest.approx([0.0, -0.01, -0.01]),
        pytest.approx([0.0, -0.0025, -0.0025]),
    ]
    with pytest.raises(ContractError, match=r"input_scale: 3 channels, the inputs have shape"):
        stepped(inputs, slope, 0.01, (1.0, 1.0, 1.0))
    acts = acts_of(build("mlp"), 40)
    still, moved = (
        scored("odin", acts, temperature=1.0, epsilon=epsilon) for epsilon in (0.0, 1e-4)
    )
    assert bool((moved < still).all()), "every row's probability rises"


def test_odin_chooses_the_step_of_the_largest_mean_probability() -> None:
    acts = acts_of(build("mlp"), 60)
    reference = Reference.from_arrays(
        logits=acts.logits, inputs=acts.inputs, probe=acts.probe, batch_size=25
    )
    odin = detectors.create("odin", temperature=10.0, choices=(0.05, 0.0, 0.5))
    chosen = float(Scorer.learn(odin, reference).state["step"])
    means = {
        step: float(scored("odin", acts, temperature=10.0, epsilon=step).mean())
        for step in (0.0, 0.05, 0.5)
    }
    assert chosen == pytest.approx(min(means, key=means.__getitem__))
    with pytest.raises(StateError):
        Scorer(odin, {})


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("odin", {"temperature": 0.0}, "temperature"),
        ("odin", {"epsilon": -0.1}, "epsilon"),
        ("odin", {"choices": (0.1, math.nan)}, "choices"),
        ("odin", {"input_scale": (1.0, 0.0)}, "input_scale"),
        ("generalized_odin", {"part": "f"}, "part"),
        ("gradnorm", {"temperature": math.inf}, "temperature"),
        ("mc_dropout", {"passes": 0}, "passes"),
        ("mc_dropout", {"rate": 1.0}, "rate"),
        ("mc_dropout", {"passes": 1, "measure": "mutual_information"}, "passes"),
        ("mc_dropout", {"measure": "variance"}, "measure"),
        ("ensemble", {"measure": "variance"}, "measure"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, object], what: str) -> None:
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.{what}"):
        detectors.create(name, **options)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradnorm_is_the_norm_that_autograd_finds(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.rand(9, 16, generator=draw)
    head = nn.Linear(16, 7)
    found = scored(
        "gradnorm",
        Activations(layers={"f": features}, logits=head(features).detach()),
        layer="f",
        temperature=temperature,
    )
    for row, score in zip(features, found, strict=True):
        head.zero_grad()
        uniform = torch.full((7,), 1 / 7)
        log_p = (head(row) / temperature).log_softmax(dim=0)
        nn.functional.kl_div(log_p, uniform, reduction="sum").backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        torch.testing.assert_close(-score, head.weight.grad.abs().sum(), rtol=1e-4, atol=1e-6)


def test_disagreement_by_hand() -> None:
    sure, other = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
    half = math.log(2)
    assert float(disagreement([sure, other], "entropy")) == pytest.approx(half, abs=1e-6)
    assert float(disagreement([sure, other], "mutual_information")) == pytest.approx(half, abs=1e-5)
    assert float(disagreement([sure, sure], "mutual_information")) == 0.0
    unsure = torch.zeros(1, 2)
    assert float(disagreement([unsure, unsure], "entropy")) == pytest.approx(half)
    assert float(disagreement([unsure, unsure], "mutual_information")) == 0.0
    assert float(disagreement([sure, unsure], "confidence")) == pytest.approx(-0.75, abs=1e-6)
    nan = torch.tensor([[math.nan, 0.0]])
    for measure in ("entropy", "mutual_information", "confidence"):
        assert disagreement([sure, nan], measure).isnan().all()


def test_disagreement_of_sure_samples_keeps_its_order() -> None:
    gaps = torch.linspace(10, 20, 50)
    answers = [
        torch.stack([gaps, torch.zeros(50)], dim=1),
        torch.stack([gaps * 1.1, torch.zeros(50)], dim=1),
    ]
    for measure in ("entropy", "mutual_information"):
        found = disagreement(answers, measure).float()
        assert bool((found.diff() < 0).all()), measure


def test_mc_dropout_is_the_mean_of_its_thinned_networks() -> None:
    acts = acts_of(build("vgg"))
    twin = Twin(build("vgg"))
    seed = 3
    found = scored("mc_dropout", acts, passes=5, seed=seed)
    networks = [
        next(twin.thinned(acts.require_inputs(), (seed * 1_000_003 + t,))) for t in range(5)
    ]
    p = torch.stack([network.require_logits().softmax(1) for network in networks]).mean(dim=0)
    torch.testing.assert_close(found, -(p * p.log()).sum(dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, scored("mc_dropout", acts, passes=5, seed=4))


def test_mc_dropout_of_a_model_without_dropout_is_refused_when_learnt() -> None:
    acts = acts_of(build("mlp"))
    reference = Reference.from_arrays(inputs=acts.inputs, probe=acts.probe)
    with pytest.raises(ContractError, match="runs no dropout"):
        Scorer.learn(detectors.create("mc_dropout"), reference)


def member(number: int) -> nn.Module:
    model = build("mlp")
    torch.manual_seed(100 + number)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model


def test_an_ensemble_is_its_members_mean_and_its_state_is_all_of_them(tmp_path: Path) -> None:
    model = build("mlp")
    acts = acts_of(model)
    for number in range(2):
        save_file(member(number).state_dict(), tmp_path / f"{number}.safetensors")
    reference = Reference.from_arrays(logits=acts.logits, inputs=acts.inputs, probe=acts.probe)
    detector = detectors.create("ensemble", weights_folder=str(tmp_path), measure="entropy")
    scorer = Scorer.learn(detector, reference)
    with torch.no_grad():
        answers = [m(acts.require_inputs()) for m in (model, member(0), member(1))]
    p = torch.stack([z.softmax(dim=1) for z in answers]).mean(dim=0)
    expected = -(p * p.log()).sum(dim=1)
    torch.testing.assert_close(scorer.score(acts), expected, rtol=1e-4, atol=1e-5)

    scorer.save(tmp_path / "scorer")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    loaded = Scorer.load(tmp_path / "scorer")
    assert torch.equal(loaded.score(acts), scorer.score(acts)), "the files are not needed again"

    save_file(member(5).state_dict(), tmp_path / "0.safetensors")
    save_file(member(1).state_dict(), tmp_path / "1.safetensors")
    assert Scorer.learn(detector, reference).digest != scorer.digest, "other weights, other digest"


def test_an_ensemble_tells_what_is_wrong_with_its_members(tmp_path: Path) -> None:
    acts = acts_of(build("mlp"))
    reference = Reference.from_arrays(logits=acts.logits, inputs=acts.inputs, probe=acts.probe)
    detector = detectors.create("ensemble", weights_folder=str(tmp_path))
    with pytest.raises(ContractError, match=r"expected 1 or more .safetensors files .* found 0"):
        Scorer.learn(detector, reference)
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    with pytest.raises(ContractError, match=r"a\.safetensors: cannot be read"):
        Scorer.learn(detector, reference)
    save_file(build("resnet").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ContractError, match=r"a\.safetensors: weights of Sequential"):
        Scorer.learn(detector, reference)
    alone = detectors.create("ensemble", weights_folder=str(tmp_path), served=False)
    with pytest.raises(ContractError, match="expected 2 or more"):
        Scorer.learn(alone, reference)
    with pytest.raises(StateError, match="member/name"):
        Scorer(detector, {"weight": torch.zeros(1)})


def test_members_of_one_architecture_have_the_same_weights() -> None:
    state = {"0/a": torch.zeros(1), "0/b": torch.zeros(1), "1/a": torch.zeros(1)}
    with pytest.raises(StateError, match="members 0 and 1 differ in 'b'"):
        Scorer(detectors.create("ensemble"), state)


@pytest.mark.parametrize("kind", ["cosine", "inner", "euclidean"])
def test_a_deconf_head_divides_similarity_by_scale(kind: str) -> None:
    torch.manual_seed(0)
    head = DeConfHead(6, 4, kind).eval()  # type: ignore[arg-type]
    features = torch.randn(5, 6)
    h, g = head.similarity(features), head.scale(features)
    torch.testing.assert_close(head(features), h / g)
    weight = head.similarity.weight
    if kind == "cosine":
        expected = nn.functional.cosine_similarity(features[:, None], weight[None], dim=2)
    elif kind == "inner":
        assert head.similarity.bias is not None
        expected = features @ weight.T + head.similarity.bias
    else:
        expected = -(features[:, None] - weight[None]).square().sum(dim=2)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
    assert bool(((g > 0) & (g <= 1)).all())
    assert head(torch.zeros(1, 6)).isfinite().all()


def test_deconf_learns_and_its_detector_reads_it() -> None:
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = torch.randn(3, 8, generator=draw) * 3
    labels = torch.randint(3, (600,), generator=draw)
    inputs = centres[labels] + torch.randn(600, 8, generator=draw)
    batches = [(inputs[i : i + 50], labels[i : i + 50]) for i in range(0, 600, 50)]
    recipe = DeConf()
    model = recipe.build(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), features=16, classes=3)
    told: list[float] = []
    recipe.train(model, batches, epochs=6, progress=lambda done, _note: told.append(done))
    assert told[-1] == 1.0
    assert not any(module.training for module in model.modules())
    assert model.head.scale.norm.momentum == 0.1
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(dim=1) == labels).float().mean())
        together = model(inputs[:9])
    assert accuracy > 0.95
    torch.testing.assert_close(together[:1], model(inputs[:1]).detach())
    twin = Twin(model)
    scorer = Scorer(detectors.create("generalized_odin", layer="head.similarity"), {})
    far = centres.mean(dim=0) - torch.randn(200, 8, generator=draw)
    inside, outside = (scorer.score(twin.run(x, ("head.similarity",))) for x in (inputs, far))
    assert float(outside.mean()) > float(inside.mean())
    assert np.allclose(
        recipe.native_score(twin.run(far, ("head.similarity",)).layer("head.similarity")), outside
    )
    stepping = Scorer(
        detectors.create("generalized_odin", layer="head.similarity", epsilon=1e-3), {}
    )
    moved = stepping.score(Activations(inputs=inputs, probe=twin))
    assert float((moved < inside).float().mean()) > 0.95, "the step raises the similarity"
    with pytest.raises(ContractError, match="no batches"):
        recipe.train(model, [], epochs=1)

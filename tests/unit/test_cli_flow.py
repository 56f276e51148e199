"""From `oodmon init` to `oodmon report`, as a newcomer types it: a real model, real images."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from oodmon.calibration import Calibration
from oodmon.cli import main
from tests.waiting import PATIENCE_SECONDS, eventually

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")

USER_CODE = """
from pathlib import Path

import numpy as np, torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = (digits.images / 16.0).astype("float32")[:, None]
known = digits.target < 8
inputs, labels = images[known], digits.target[known]
novel = images[~known]
weights = Path(__file__).with_suffix(".safetensors")

def model():
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("stage1", nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()))
    made.add_module("stage2", nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()))
    made.add_module("flat", nn.Flatten())
    made.add_module("fc", nn.Linear(16 * 9, 8))
    if not weights.exists():
        save_file(trained(made).state_dict(), weights)
    made.load_state_dict(load_file(weights))
    return made

def trained(made):
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(10):
        for rows in torch.randperm(600).split(50):
            optimizer.zero_grad()
            logits = made(torch.tensor(inputs)[rows])
            nn.functional.cross_entropy(logits, torch.tensor(labels)[rows]).backward()
            optimizer.step()
    return made

def reference():
    return model(), (inputs[600:1100], labels[600:1100])

def retrained():
    made = model()
    with torch.no_grad():
        made.fc.weight.mul_(1.1)
    return made, (inputs[600:1100], labels[600:1100])

def rotated():
    return np.rot90(inputs[1100:], axes=(2, 3)).copy()

def used_up():
    return model(), iter([(inputs, labels)])
"""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="oodmon")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's code, a config, and what `fit` made."""
    folder = tmp_path_factory.mktemp("project")
    module = "digits_of_the_cli_flow"
    (folder / f"{module}.py").write_text(USER_CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        made = call("init", "--model", f"{module}:model", "--name", "digits")
        assert made.exit_code == 0, made.output
        assert "penultimate: the input of fc" in made.stdout
        text = (folder / "oodmon.yaml").read_text()
        text = text.replace("length_seconds: 60", "length_seconds: 2")
        text = text.replace("allowed_lateness_seconds: 10", "allowed_lateness_seconds: 3")
        text = text.replace("port: 9464", "port: 0").replace(
            "overhead_budget: 0.01", "overhead_budget: 1"
        )
        (folder / "oodmon.yaml").write_text(text)
        fitted = call("fit", "oodmon.yaml", f"{module}:reference")
        assert fitted.exit_code == 0, fitted.output
        (folder / "fitted.txt").write_text(fitted.stdout)
        yield folder
    sys.modules.pop(module, None)


def test_what_init_wrote_has_no_problems_and_is_not_replaced(project: Path) -> None:
    shown = call("check", str(project / "oodmon.yaml"))
    assert shown.exit_code == 0, shown.output
    assert "detectors msp, energy, gram" in shown.stdout
    assert not shown.stderr
    again = call("init", str(project / "oodmon.yaml"))
    assert again.exit_code == 2
    assert "--force replaces it" in again.stderr


def test_fit_says_what_it_did_and_what_it_supports(project: Path) -> None:
    told = (project / "fitted.txt").read_text()
    assert "reference: 500 samples of arrays" in told
    shares = re.search(r"learnt from (\d+) samples, calibrated with (\d+) others", told)
    assert shares
    assert sum(map(int, shares.groups())) == 500
    assert "false alarms come at most 1 per 30 days" in told
    assert "flag_level 0.001 needs 999" in told
    written = sorted(path.name for path in (project / "states").iterdir())
    assert written == [
        f"{name}{kind}.safetensors"
        for name in ("energy", "gram", "msp")
        for kind in (".calibration", "")
    ]


def test_fit_twice_learns_the_same(project: Path) -> None:
    before = _learnt(project)
    assert set(before) == {"energy", "gram", "msp"}
    assert call("fit", "oodmon.yaml", "digits_of_the_cli_flow:reference").exit_code == 0
    assert _learnt(project) == before
    assert call("fit", "oodmon.yaml", "digits_of_the_cli_flow:reference", "--seed=1").exit_code == 0
    assert _learnt(project)["gram"] != before["gram"]


def test_a_model_that_was_trained_again_is_told(project: Path, tmp_path: Path) -> None:
    (tmp_path / "oodmon.yaml").write_text((project / "oodmon.yaml").read_text())
    config, said = str(tmp_path / "oodmon.yaml"), "fitted on other weights"

    def fit(data: str) -> str:
        done = call("fit", config, f"digits_of_the_cli_flow:{data}", "--no-advice")
        assert done.exit_code == 0, done.output
        return done.stderr

    def judge(model: str) -> str:
        done = call("evaluate", config, "novel=digits_of_the_cli_flow:novel", f"--model={model}")
        assert done.exit_code == 0, done.output
        return done.stderr

    assert said not in fit("reference"), "nothing was there to be replaced"
    assert said not in fit("reference"), "the same weights"
    assert said not in judge("digits_of_the_cli_flow:model")
    told = fit("retrained")
    assert f"msp, energy, gram: {said}, also of 'digits' version '1': they are replaced" in told
    told = judge("digits_of_the_cli_flow:model")
    assert f"msp, energy, gram: {said} than the model has now" in told
    assert said not in fit("retrained")
    text = (tmp_path / "oodmon.yaml").read_text()
    (tmp_path / "oodmon.yaml").write_text(text.replace('version: "1"', 'version: "2"'))
    assert 'version: "2"' in (tmp_path / "oodmon.yaml").read_text()
    assert said not in fit("reference"), "another version may have other weights"


def _learnt(project: Path) -> dict[str, tuple[str, bytes]]:
    """Detector → digest of its scorer and the scores of its calibration."""
    found = {}
    for path in (project / "states").glob("*.calibration.safetensors"):
        calibration = Calibration.load(path)
        found[calibration.detector] = (calibration.digest, calibration.scores.tobytes())
    return found


def test_fit_takes_files_and_folders(project: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    config = (project / "oodmon.yaml").read_text().replace("    gram: {type: gram}\n", "")
    (tmp_path / "oodmon.yaml").write_text(config)
    digits = datasets.load_digits()
    known = digits.target < 8
    pixels = (digits.images[known] * 15.9).astype(np.uint8)[600:700]
    np.savez(tmp_path / "r.npz", images=pixels, labels=digits.target[known][600:700])
    for index, (pixel, label) in enumerate(zip(pixels, digits.target[known][600:700], strict=True)):
        folder = tmp_path / "r" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixel).save(folder / f"{index}.png")
    model = "--model=digits_of_the_cli_flow:model"
    arguments = [str(tmp_path / "oodmon.yaml"), model]
    for data in (
        ["r.npz"],
        ["r", "--image-mode", "L"],
        ["r", "--image-mode=L", "--image-size=8x8"],
    ):
        shown = call("fit", *arguments, str(tmp_path / data[0]), *data[1:])
        assert shown.exit_code == 0, shown.output
        accuracy = re.search(r"accuracy (\d\.\d+)", shown.stdout)
        assert accuracy
        assert float(accuracy.group(1)) > 0.8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits_of_the_cli_flow:used_up"], "the data set is an iterator, which one pass uses up"),
        (["digits_of_the_cli_flow:nothing"], "digits_of_the_cli_flow has no 'nothing'"),
        (["no_such_module:data"], "there is no module 'no_such_module'"),
        (["none.npz", "--model=digits_of_the_cli_flow:model"], "there is no none.npz"),
        (["none.npz"], "--model is needed with a file or a folder"),
        (["digits_of_the_cli_flow:reference", "--learn-share=1"], "1.0 is not in (0, 1)"),
        (["states", "--model=digits_of_the_cli_flow:model"], "expected one sub-folder of images"),
        (
            ["digits_of_the_cli_flow:inputs", "--model=digits_of_the_cli_flow:known"],
            "found ndarray",
        ),
    ],
)
@pytest.mark.usefixtures("project")
def test_fit_says_what_is_wrong_with_the_data(arguments: list[str], said: str) -> None:
    shown = call("fit", "oodmon.yaml", *arguments)
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr


def test_evaluate_judges_data_sets_by_the_held_out_scores(project: Path) -> None:
    shown = call(
        "evaluate",
        "novel=digits_of_the_cli_flow:novel",
        "turned=digits_of_the_cli_flow:rotated",
        "--model=digits_of_the_cli_flow:model",
        "--json",
        "--output=evaluated.html",
    )
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    rows = {(row["data"], row["detector"]): row for row in told["results"]}
    assert set(rows) == {(d, n) for d in ("novel", "turned") for n in ("msp", "energy", "gram")}
    assert told["against"] == "held-out samples of fit"
    # by hand: the model, the learnt file and the calibration, without the verb's own pass
    from oodmon.detectors import Scorer
    from oodmon.evaluate import evaluate
    from oodmon.records import Activations

    code = sys.modules["digits_of_the_cli_flow"]
    model = code.model().eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(code.novel))
    scores = Scorer.load(project / "states" / "energy.safetensors").score(
        Activations(logits=logits)
    )
    held_out = Calibration.load(project / "states" / "energy.calibration.safetensors").scores
    wanted = evaluate(held_out, scores.numpy())
    found = rows["novel", "energy"]
    assert (found["ids"], found["oods"], found["unscored"]) == (len(held_out), 354, 0)
    assert found["auroc"] == pytest.approx(wanted.auroc, abs=1e-4)
    assert found["fpr95_id"] == pytest.approx(1.0 - wanted.tnr_at_tpr95, abs=0.01)
    page = (project / "evaluated.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")
    for name in ("novel", "turned", "msp", "energy", "gram"):
        assert f"<td>{name}</td>" in page or f"<h2>{name}</h2>" in page


def test_evaluate_takes_files_folders_and_other_reference_data(
    project: Path, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    digits = datasets.load_digits()
    pixels = (digits.images[digits.target >= 8] * 15.9).astype(np.uint8)[:40]
    # labels that fitting would leave out, and images that lie in no sub-folder
    np.savez(tmp_path / "novel.npz", images=pixels, labels=np.full(40, -1))
    for index, pixel in enumerate(pixels):
        image.fromarray(pixel).save(tmp_path / f"{index}.png")
    shown = call(
        "evaluate",
        str(project / "oodmon.yaml"),
        f"file={tmp_path / 'novel.npz'}",
        f"folder={tmp_path}",
        "--against=digits_of_the_cli_flow:reference",
        "--image-mode=L",
        "--detector=msp",
        "--json",
    )
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["against"] == "500 samples of arrays"
    file, folder = told["results"]
    assert (file["ids"], file["oods"]) == (500, 40)
    assert {k: v for k, v in file.items() if k != "data"} == {
        k: v for k, v in folder.items() if k != "data"
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give at least one NAME=DATA"),
        (["oodmon.yaml", "novel"], "expected NAME=DATA, such as blurred=blurred.npz"),
        (["a=x.npz", "a=y.npz"], "'a' names two data sets"),
        (["a=x.npz"], "a: there is no x.npz"),
        (["a=digits_of_the_cli_flow:novel"], "no DATA returned a model; name it with --model"),
        (
            ["a=digits_of_the_cli_flow:reference", "--detector=knn"],
            "has no 'knn'; it has msp, energy, gram",
        ),
        (["a=digits_of_the_cli_flow:none_of_them"], "has no 'none_of_them'"),
    ],
)
@pytest.mark.usefixtures("project")
def test_evaluate_says_what_is_wrong(arguments: list[str], said: str) -> None:
    shown = call("evaluate", *arguments)
    assert shown.exit_code == 2, shown.output
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr


def test_evaluate_tells_a_table_best_first(project: Path) -> None:
    shown = call("evaluate", str(project / "oodmon.yaml"), "same=digits_of_the_cli_flow:reference")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    (head,) = [line for line in lines if line.startswith(" detector")]
    for column in ("AUROC", "AUPR OOD+", "AUPR ID+", "FPR95 OOD+", "FPR95 ID+"):
        assert column in head
    rows = [line.split() for line in lines[lines.index(head) + 1 :] if line.strip()]
    figures = {row[0]: float(row[1]) for row in rows}
    assert list(figures.values()) == sorted(figures.values(), reverse=True)
    for name in ("msp", "energy"):
        assert 0.4 < figures[name] < 0.6, "it is the data that was fitted and held out"


def test_served_watched_alarmed_and_told(project: Path) -> None:
    """The agent in one process, the daemon in another, and every verb that looks at the result."""
    serve = (
        "import time, numpy as np, torch, oodmon\n"
        "import digits_of_the_cli_flow as code\n"
        "model = code.model()\n"
        "agent = oodmon.attach(model, 'oodmon.yaml', source='server')\n"
        "draw = np.random.default_rng(0)\n"
        "for pool in (code.inputs[1100:], code.novel):\n"
        "    for _ in range(60):\n"
        "        with torch.no_grad():\n"
        "            model(torch.tensor(pool[draw.integers(len(pool), size=32)]))\n"
        "        time.sleep(0.05)\n"
        "        while agent.stats().seen - agent.stats().scored > 320:\n"
        "            time.sleep(0.01)\n"
        "assert agent.detach(100)\n"
    )
    command = [sys.executable, "-m", "oodmon", "run", "oodmon.yaml"]
    daemon = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
    try:
        subprocess.run(
            [sys.executable, "-c", serve], cwd=project, check=True, timeout=PATIENCE_SECONDS
        )
        eventually(lambda: bool(_firing(project)))
        firing = _firing(project)
    finally:
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=PATIENCE_SECONDS)
    assert daemon.returncode == 0, log
    assert [row["rule"] for row in firing] == ["drift"], log
    assert "FIRING drift" in log
    assert "digits version 1: detectors msp, energy, gram; drift tests budget" in log
    told = call("status", "oodmon.yaml")
    assert "1 firing" in told.stdout
    assert "server" in told.stdout
    tail = call("tail", "oodmon.yaml", "--since", "1h", "--once", "--json")
    (alert,) = [json.loads(line) for line in tail.stdout.splitlines()]
    assert (alert["kind"], alert["status"]) == ("alert", "firing")
    replayed = call("replay", "oodmon.yaml", "--json")
    (again,) = [json.loads(line) for line in replayed.stdout.splitlines()]
    assert again["at_ns"] == alert["started_at_ns"]
    assert call("replay", "oodmon.yaml", "--last", "1s").exit_code == 0
    assert "no dead letters" in call("events", "dead", "oodmon.yaml").stdout
    assert call("events", "replay", "oodmon.yaml", "7").exit_code == 1
    written = call("report", "oodmon.yaml", "-o", "seen.html")
    assert written.exit_code == 0, written.output
    assert "digits" in (project / "seen.html").read_text()


def test_dead_letters_are_listed_read_and_replayed(project: Path) -> None:
    from oodmon.store.events import Store
    from tests.unit import store_facts as made

    config = str(project / "oodmon.yaml")
    store = Store(f"sqlite:///{project / 'oodmon.db'}")
    store.open()
    store.append(
        [],
        state=b"",
        positions={},
        outbox=[(f"sinks.{name}", made.event(f"e{at}")) for name in "ab" for at in range(3)],
    )
    for name in ("sinks.a", "sinks.b"):
        seqs = [row.seq for row in store.pending(name, 2**62, 2)]
        store.defer(name, seqs, 1, "refused")
        store.bury(name, seqs, "rejected: too large")
    listed = call("events", "dead", config, "--json")
    found = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [(one["receiver"], one["id"]) for one in found] == [
        *(("sinks.a", "e0"), ("sinks.a", "e1"), ("sinks.b", "e0"), ("sinks.b", "e1")),
    ]
    assert {one["reason"] for one in found} == {"rejected: too large"}
    assert {one["attempts"] for one in found} == {2}
    assert all(0 < one["first_failed_ns"] <= one["last_failed_ns"] for one in found)
    seq = str(found[3]["seq"])
    people = call("events", "dead", config, "-r", "sinks.b").stdout.splitlines()
    assert len(people) == 2
    assert "2 attempts" in people[0]
    assert "too large" in people[0]
    shown = json.loads(call("events", "show", config, seq).stdout)
    assert shown == found[3]
    assert shown["data"] == made.event("e1").data
    assert call("events", "show", config, "999").exit_code == 1
    assert call("events", "replay", config).exit_code == 2
    assert call("events", "replay", config, seq, "--all").exit_code == 2
    one = call("events", "replay", config, seq, "999", "--json")
    assert one.exit_code == 1, "a number that is none is told"
    assert json.loads(one.stdout.splitlines()[0]) == {"sinks.b": 1}
    (revived,) = [row for row in store.pending("sinks.b", 2**62, 9) if row.seq == int(seq)]
    assert (revived.attempts, revived.error, revived.first_failed_ns) == (0, "", 0)
    assert "2 pending again for sinks.a" in call("events", "replay", config, "--all").stdout
    assert store.depths()["sinks.b"].dead == 0
    assert "nothing to replay" in call("events", "replay", config, "--all").stdout
    store.close()


def _firing(project: Path) -> list[dict[str, object]]:
    shown = call("status", str(project / "oodmon.yaml"), "--json")
    found: list[dict[str, object]] = json.loads(shown.stdout)["firing"] if shown.stdout else []
    return found

"""See oodmon work: train, fit, serve, drift, alarm, report. `make demo` runs it.

A small network learns eight of the ten handwritten digits that scikit-learn ships. It is then
served from this process, watched by one added line, while a daemon in another process keeps the
statistics. Traffic is clean at first, then slightly noisy, then it holds the two digits that the
network has never seen. No image is served twice in a phase, and none was trained or calibrated on.

KAFKA=host:port and GRAFANA=url (with GRAFANA_TOKEN) publish the alerts there too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import oodmon
from oodmon.store.events import Store

NOVEL_DIGITS: Final = (4, 6)
PROMISE: Final = "1 per 7 days"
SEED: Final = 0
REQUEST_ROWS: Final = 4
"""Images per request: what a small service gets at once."""
REQUESTS_PER_SECOND: Final = 12.0
PHASES: Final = ("clean", "noisy", "novel")
OUT: Final = Path(os.environ.get("OODMON_DEMO_OUT", "demo-output"))

CONFIG: Final = """\
model: {{name: digits, version: "1"}}

agent:
  tap: {{type: hooks, layers: auto, overhead_budget: 1.0}}   # every request: there are few here
  detectors:
    msp: {{type: msp}}
    gram: {{type: gram}}
    duq: {{type: duq}}
    rnd: {{type: rnd}}
    error: {{type: expected_error}}   # how often the model is wrong, as far as its own doubt tells
  states: states/
  feed: {{type: spool, path: spool/}}

daemon:
  feed: {{type: spool, path: spool/}}
  calibration: {{path: states/}}
  windows: {{length_seconds: 1, allowed_lateness_seconds: 0.5}}
  flag_level: 0.005
  drift:
    budget: {{type: budget, false_alarms: {promise}, tolerated_fraction: 0.05}}
  rules:
    novelty: {{drift: budget, severity: critical, triggers: [retrain]}}
  store: {{url: "sqlite:///oodmon.db"}}
  sinks:
    log: {{type: log}}
{sinks}  triggers:
    retrain: {{type: webhook, url: "http://127.0.0.1:9/retrain", dry_run: true}}
  http: {{host: 127.0.0.1, port: 0}}
"""

F4 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int64]
console = Console(highlight=False)


class DigitsNet(nn.Module):
    """Two convolutional stages, one hidden layer, one head: (B, 1, 8, 8) → (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.stage2 = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU())
        self.fc = nn.Linear(64, 10 - len(NOVEL_DIGITS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        found: torch.Tensor = self.fc(self.hidden(self.stage2(self.stage1(images))))
        return found


def _digits() -> dict[str, tuple[F4, I8]]:
    """Disjoint shares: train, reference, serve (known digits) and novel (the others)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    pixels = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    known = ~np.isin(labels, NOVEL_DIGITS)
    order = np.random.default_rng(SEED).permutation(np.flatnonzero(known))
    names = [digit for digit in range(10) if digit not in NOVEL_DIGITS]
    classes = np.searchsorted(names, labels)
    parts = {"train": order[:500], "reference": order[500:1000], "serve": order[1000:]}
    shares = {name: (pixels[rows], classes[rows].astype(np.int64)) for name, rows in parts.items()}
    novel = np.random.default_rng(SEED).permutation(np.flatnonzero(~known))
    return shares | {"novel": (pixels[novel], labels[novel].astype(np.int64))}


def _model() -> DigitsNet:
    model = DigitsNet()
    model.load_state_dict(load_file(OUT / "model.safetensors"))
    return model.eval()


def reference() -> tuple[nn.Module, tuple[F4, I8]]:
    """What `oodmon fit` asks for: the served model and in-distribution data."""
    return _model(), _digits()["reference"]


def train() -> None:
    """Train on 500 images; seconds on a laptop."""
    images, labels = (torch.from_numpy(array) for array in _digits()["train"])
    torch.manual_seed(SEED)
    model = DigitsNet()
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        order = torch.randperm(len(images))
        for first in range(0, len(images), 32):
            rows = order[first : first + 32]
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
            optimiser.step()
    model.eval()
    save_file(model.state_dict(), OUT / "model.safetensors")
    held, truth = (torch.from_numpy(array) for array in _digits()["serve"])
    with torch.inference_mode():
        accuracy = (model(held).argmax(1) == truth).float().mean().item()
    console.print(
        f"   trained on {len(images)} images of 8 digits; held-out accuracy {accuracy:.1%}"
    )


def _sinks() -> str:
    lines = ""
    if os.environ.get("KAFKA"):
        lines += '    kafka: {type: kafka, bootstrap_servers: ["${KAFKA}"], topic: oodmon.alerts}\n'
    if os.environ.get("GRAFANA"):
        lines += '    grafana: {type: grafana, url: "${GRAFANA}", token: "${GRAFANA_TOKEN}"}\n'
    return lines


def _oodmon(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "oodmon", *arguments]


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"PYTHONPATH": path, "OODMON_DEMO_OUT": str(OUT.resolve())}


@contextmanager
def _daemon(config: Path) -> Iterator[None]:
    with (OUT / "daemon.log").open("wb") as log:
        process = subprocess.Popen(_oodmon("run", str(config)), stdout=log, stderr=log)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    if process.returncode:
        raise SystemExit(f"the daemon failed:\n{(OUT / 'daemon.log').read_text()[-3000:]}")


def _traffic(phase: str) -> tuple[F4, I8]:
    """The images of one phase, each once, and their classes; -1 where the network has none."""
    shares = _digits()
    rng = np.random.default_rng(SEED + 1)
    order = rng.permutation(len(shares["serve"][0]))
    clean, truth = shares["serve"][0][order], shares["serve"][1][order]
    if phase == "clean":
        return clean, truth
    if phase == "noisy":
        noise = rng.normal(0.0, 0.05, clean.shape).astype(np.float32)
        half = len(clean) // 2
        return np.clip(clean + noise, 0.0, 1.0)[:half], truth[:half]
    # Three new digits in five: the service still gets what it knows as well.
    novel = shares["novel"][0]
    known = len(novel) * 2 // 3
    order = rng.permutation(len(novel) + known)
    images = np.concatenate([novel, clean[:known]])
    classes = np.concatenate([np.full(len(novel), -1), truth[:known]])
    return images[order], classes[order]


def _accuracy(phase: str) -> float:
    """What the daemon cannot know: the share of right answers in one phase."""
    images, truth = _traffic(phase)
    with torch.inference_mode():
        answers = _model()(torch.from_numpy(images)).argmax(1).numpy()
    return float((answers == truth).mean())


class Progress:
    """What the terminal shows while traffic flows: a table that lives, or a line now and then."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.phase = ""
        self.served = 0
        self.starts: dict[str, tuple[int, int]] = {}
        self._told = 0.0

    def begin(self, phase: str) -> None:
        """A phase starts now."""
        self.phase = phase
        self.starts[phase] = (time.time_ns(), self.served)

    def alerts(self) -> list[dict[str, Any]]:
        """Episodes so far."""
        return self.store.alerts()

    def phase_of(self, started_at: int) -> str:
        """The phase in which an episode began."""
        begun = [name for name, (at, _) in self.starts.items() if at <= started_at + 1_000_000_000]
        return begun[-1] if begun else PHASES[0]

    def __rich__(self) -> Table:
        table = Table(title=f"traffic: {self.phase} · {self.served} images served", width=78)
        for name in ("detector", "evidence (log10)", "alarm at", ""):
            table.add_column(name)
        for row in self._latest():
            share = max(0.0, min(1.0, row["statistic"] / row["threshold"]))
            bar = "█" * round(24 * share) + "░" * (24 - round(24 * share))
            name = "all together" if row["detector"] == "*" else row["detector"]
            style = "bold red" if row["drifted"] else ""
            table.add_row(
                name, f"{row['statistic']:+.1f}", f"{row['threshold']:.1f}", bar, style=style
            )
        return table

    def line(self) -> None:
        """For logs that are no terminal."""
        if time.monotonic() - self._told < 5:
            return
        self._told = time.monotonic()
        overall = [row for row in self._latest() if row["detector"] == "*"]
        evidence = (
            f"{overall[0]['statistic']:+.1f} of {overall[0]['threshold']:.1f}" if overall else "–"
        )
        console.print(f"   {self.phase}: {self.served} images served, evidence (log10) {evidence}")

    def _latest(self) -> list[dict[str, Any]]:
        rows = self.store.drift_results(newest_first=True, limit=5)
        newest = max((row["window_start_ns"] for row in rows), default=0)
        return sorted(
            (row for row in rows if row["window_start_ns"] == newest),
            key=lambda row: row["detector"],
        )


def serve(progress: Progress, model: nn.Module, config: Path, live: Live | None) -> None:
    """Send the traffic of all phases through the watched model."""
    with oodmon.attach(model, config) as agent:
        for line in agent.found:
            console.print(f"   tap: {line}", markup=False)
        for phase in PHASES:
            images = torch.from_numpy(_traffic(phase)[0])
            np.save(OUT / f"{phase}.npy", images.numpy())
            progress.begin(phase)
            due = time.monotonic()
            for number, first in enumerate(range(0, len(images), REQUEST_ROWS)):
                request = images[first : first + REQUEST_ROWS]
                ids = tuple(f"{phase}-{first + row}" for row in range(len(request)))
                with agent.request(ids=ids), torch.inference_mode():
                    model(request)
                progress.served += len(request)
                due += 1.0 / REQUESTS_PER_SECOND
                if live is None:
                    progress.line()
                elif number % 6 == 0:
                    live.refresh()
                time.sleep(max(0.0, due - time.monotonic()))
            # A pause between phases, so that each one's last window closes under its own name.
            time.sleep(2.0)


def thumbnails() -> Path:
    """The served images by sample id, for the report."""
    arrays = {phase: np.load(OUT / f"{phase}.npy") for phase in PHASES}
    ids = [f"{phase}-{row}" for phase in PHASES for row in range(len(arrays[phase]))]
    images = (255 * np.concatenate([arrays[phase][:, 0] for phase in PHASES])).astype(np.uint8)
    path = OUT / "thumbnails.npz"
    np.savez_compressed(path, ids=np.array(ids), images=images)
    return path


def conclude(progress: Progress, url: str) -> int:
    """Say what happened; 0 if it is what should."""
    from oodmon.report import build as build_report

    alerts = progress.alerts()
    by_phase: dict[str, list[dict[str, Any]]] = {phase: [] for phase in PHASES}
    for alert in alerts:
        by_phase[progress.phase_of(alert["started_at_ns"])].append(alert)
    console.rule("what happened")
    for phase in PHASES:
        if not by_phase[phase]:
            console.print(f"{phase:>6}: no alarm")
        for alert in by_phase[phase]:
            evidence = alert["evidence"]
            evidence = json.loads(evidence) if isinstance(evidence, str) else evidence
            samples = evidence["samples"] - progress.starts[phase][1]
            strongest = evidence["streams"][0]["detector"]
            console.print(
                f"{phase:>6}: [bold red]alarm[/] `{alert['rule']}` ({alert['severity']}) after "
                f"{samples} images of this phase; strongest detector {strongest}"
            )
            console.print(f"        {evidence['summary']}")
            console.print(f"        promise: {evidence['promise']}")
            for row in evidence.get("accuracy", ()):
                console.print(
                    f"        does it matter: by the model's own doubt its accuracy fell from "
                    f"{row['before']:.0%} to {row['now']:.0%} at that moment. In truth it is "
                    f"{_accuracy(phase):.0%} in this phase: it is sure of what it never saw. An "
                    "estimate is a reason to look; labels that come late tell (docs/alarms.md)"
                )
    report = build_report(url, OUT / "report.html", thumbnails=thumbnails())
    for firing in progress.store.firings():
        console.print(f"trigger: `{firing['trigger_id']}` → {firing['outcome']}")
    console.print(f"database: {OUT / 'oodmon.db'}")
    console.print(f"  report: {report}   (open it in a browser)")
    console.print("    next: [bold]oodmon status demo-output/oodmon.yaml[/], then your own model:")
    console.print("          [bold]oodmon init --model your.module:model[/]")
    good = bool(by_phase["novel"]) and not by_phase["clean"]
    if not good:
        console.print("[bold red]expected an alarm in the novel phase, and none in the clean one")
    return 0 if good else 1


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="lines instead of a live table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    config = OUT / "oodmon.yaml"
    config.write_text(CONFIG.format(promise=PROMISE, sinks=_sinks()))

    console.rule("1 · a model in production")
    train()
    console.rule("2 · oodmon fit: what is normal?")
    subprocess.run(_oodmon("fit", str(config), "demo:reference"), check=True, env=_environment())
    console.rule("3 · oodmon run: the daemon, in a process of its own")
    url = f"sqlite:///{(OUT / 'oodmon.db').resolve()}"
    with _daemon(config):
        store = Store(url)
        store.open()
        progress = Progress(store)
        console.rule("4 · traffic, through a model watched by one line: oodmon.attach")
        if console.is_terminal and not arguments.plain:
            with Live(progress, console=console, auto_refresh=False) as live:
                serve(progress, _model(), config, live)
        else:
            serve(progress, _model(), config, None)
        _drained(progress)
        status = conclude(progress, url)
        store.close()
    return status


def _drained(progress: Progress) -> None:
    """Wait until the daemon has concluded from everything that was served."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        scored = sum(agent["samples"] for agent in progress.store.agents())
        if scored >= progress.served and not progress.store.depths():
            break
        time.sleep(0.2)
    time.sleep(2.0)


if __name__ == "__main__":
    sys.exit(main())

"""Any YAML gives problems or a config, never a traceback."""

from __future__ import annotations

import re
import string
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oodmon.config.parse import loads
from oodmon.config.schema import Config
from oodmon.errors import ConfigError

VALID = """\
model: {name: digits, version: "1"}
agent:
  tap: {type: hooks, layers: auto, overhead_budget: 0.01}
  detectors:
    msp: {type: msp}
    gram: {type: gram, layers: [stage1, stage2]}
  states: states/
  feed: {type: spool, path: spool/}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
  flag_level: 1e-3
  windows: {length_seconds: 10, every_seconds: 0, allowed_lateness_seconds: 5}
  drift:
    budget: {type: budget, false_alarms: "1 per 30 days", tolerated_fraction: 0.02}
    slow: {type: ks}
  rules:
    novelty: {drift: budget, severity: critical, for_windows: 1, triggers: [retrain]}
  store: {url: "sqlite:///oodmon.db"}
  sinks:
    log: {type: log, events: [alert, window]}
    kafka: {type: kafka, bootstrap_servers: ["${KAFKA}"], password: "${SECRET}"}
  triggers:
    retrain: {type: webhook, url: "https://ci/retrain", cooldown_seconds: 86400, dry_run: true}
  http: {host: 127.0.0.1, port: 9464}
"""
ENVIRONMENT = {"KAFKA": "localhost:9092", "SECRET": "v3ry-secret"}
LINE = re.compile(r"oodmon\.yaml:[1-9][0-9]*:[1-9][0-9]*: \S.*", re.DOTALL)

WORDS = sorted(set(re.findall(r"[A-Za-z_0-9.]+", VALID)))
PIECES = [*WORDS, *"{}[]:,-?&*!|>%@`#'\"\n\t \\$~<", "${", "${X}", "$${", "<<: *a", "&a ", "*a",
          "!!int ", "!!python/object:os.system ", "\\ud800", "\x07", "\u2028", "1:30", "0o7",
          "1e999", ".nan", "9" * 5000, "---\n", "%YAML 1.9\n"]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(WORDS)
    | st.dates()
)
keys = st.sampled_from(WORDS) | st.text(string.ascii_letters + "_-.0", max_size=8)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=25,
)

lenient = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _problems_or_config(data: bytes, half: str = "both") -> Config | ConfigError:
    outcome: Config | ConfigError
    try:
        outcome = loads(data, half, environment=ENVIRONMENT)  # type: ignore[arg-type]
    except ConfigError as error:
        outcome = error
    problems = outcome.problems if isinstance(outcome, ConfigError) else ("oodmon.yaml:1:1: none",)
    assert problems
    for problem in problems:
        assert LINE.fullmatch(problem), problem
        assert "\n" not in problem
        assert "v3ry-secret" not in problem
        problem.encode()  # what cannot be printed would end the command with a traceback
    assert "v3ry-secret" not in repr(outcome)
    return outcome


def test_the_seed_of_the_mutations_is_valid() -> None:
    config = loads(VALID.encode(), environment=ENVIRONMENT)
    assert config.agent is not None
    assert config.daemon is not None


@lenient
@given(documents)
def test_any_yaml_value(document: Any) -> None:
    _problems_or_config(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace"))


@lenient
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join))
def test_any_text(text: str) -> None:
    _problems_or_config(text.encode("utf-8", "surrogatepass"))


@lenient
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    _problems_or_config(data)


@lenient
@given(st.data(), st.sampled_from(["agent", "daemon", "both"]))
def test_any_mutation_of_a_valid_file(data: st.DataObject, half: str) -> None:
    text = VALID
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(st.sampled_from(PIECES)) + text[end:]
    _problems_or_config(text.encode(), half)


@lenient
@given(st.data(), documents)
def test_any_value_in_any_place(data: st.DataObject, value: Any) -> None:
    document = yaml.safe_load(VALID)
    inner = document
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = value
    _problems_or_config(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace"))


@lenient
@given(st.lists(st.integers(0, VALID.count("\n") - 1), unique=True, max_size=6))
def test_problems_come_in_file_order(dropped: list[int]) -> None:
    lines = [line for i, line in enumerate(VALID.splitlines()) if i not in dropped]
    outcome = _problems_or_config("\n".join(lines).encode())
    if isinstance(outcome, ConfigError):
        places = [tuple(map(int, problem.split(":")[1:3])) for problem in outcome.problems]
        assert places == sorted(places)

"""What is said about a config, and where."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from oodmon.config.document import MAX_ALIASES, MAX_BYTES, MAX_DEPTH
from oodmon.config.parse import load, loads
from oodmon.config.schema import Config, DaemonSection
from oodmon.errors import ConfigError

DAEMON = """\
model: {name: digits, version: "1"}
daemon:
  feed: {type: spool, path: spool/}
  calibration: {path: states/}
"""


def problems(text: str, half: str = "daemon", **environment: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loads(dedent(text).encode(), half, environment=environment)  # type: ignore[arg-type]
    return list(caught.value.problems)


def daemon_of(extra: str, **environment: str) -> DaemonSection:
    config = loads((DAEMON + extra).encode(), "daemon", environment=environment)
    assert config.daemon is not None
    return config.daemon


def test_the_two_messages_of_the_design() -> None:
    text = """\
        agent: {states: states/, feed: {type: memory}, detectors: {
          confidence: {type: msp, temprature: 2.0}}}
        model: {name: digits}
        daemon:
          feed: {type: memory}
          calibration: {path: states/}
          drift:
            slow: {type: ks, alpha: "${OODMON_ALPHA}"}
        """
    assert problems(text, "both") == [
        (
            "oodmon.yaml:2:27: agent.detectors.confidence.temprature: unknown option; "
            "did you mean `temperature`?"
        ),
        "oodmon.yaml:8:29: daemon.drift.slow.alpha: environment variable OODMON_ALPHA is not set",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  flag_level: lots", "5:15: daemon.flag_level: expected a number, found the text 'lots'"),
        (
            '  flag_level: "0.01"',
            ("5:15: daemon.flag_level: expected a number, found the text '0.01'; "
             "leave out the quotes"),
        ),
        (
            "  flag_level: on",
            "5:15: daemon.flag_level: expected a number, found 'on' (YAML: true or false)",
        ),
        ("  flag_level: 1.5", "5:15: daemon.flag_level: 1.5 is not in (0, 1)"),
        ("  flag_level: 1e999", ("5:15: daemon.flag_level: expected a number, found the text "
         "'1e999'; it is out of range")),
        ("  flag_level: [0.1]", "5:15: daemon.flag_level: expected a number, found a list"),
        ("  flag_level: ", "5:14: daemon.flag_level: expected a number, found nothing"),
        (
            "  http: {port: 80.5}",
            "5:16: daemon.http.port: expected a whole number, found the number 80.5",
        ),
        (
            "  http: {port: 1:30}",
            "5:16: daemon.http.port: expected a whole number, found the number 1:30",
        ),
        (
            "  http: {port: 010}",
            "5:16: daemon.http.port: expected a whole number, found the number 010",
        ),
        ("  http: {port: 65536}", "5:16: daemon.http.port: 65536 is not in [0, 65535]"),
        (
            "  http: {host: 127}",
            '5:16: daemon.http.host: expected text, found the number 127; write "127" in quotes',
        ),
        ("  htpp: {}", "5:3: daemon.htpp: unknown section; did you mean `http`?"),
        (
            "  sinks: {log: {type: lgo}}",
            "5:23: daemon.sinks.log.type: sinks: nothing is called 'lgo'; did you mean `log`?",
        ),
        (
            "  sinks: {log: {}}",
            ("5:16: daemon.sinks.log.type: is required and missing; one of grafana, kafka, log, "
            "webhook"),
        ),
        (
            "  sinks: {log: log}",
            "5:16: daemon.sinks.log: expected a map such as {type: …}, found the text 'log'",
        ),
        (
            "  sinks: {9: {type: log}}",
            ("5:11: daemon.sinks.9: an id is 1 to 64 letters, digits, `_` or `-`, "
             "the first no digit"),
        ),
        (
            "  sinks: {log: {type: log, events: [alrt]}}",
            ("5:37: daemon.sinks.log.events[0]: expected one of `alert`, `notice`, `window`, "
            "`drift`, `sample`, found the text 'alrt'; did you mean `alert`?"),
        ),
        (
            "  sinks: {log: {type: log, events: alert}}",
            ("5:36: daemon.sinks.log.events: expected a list, each one of `alert`, `notice`, "
            "`window`, `drift`, `sample`, found the text 'alert'; write it as [ … ]"),
        ),
        (
            "  triggers: {ci: {type: webhook}}",
            "5:18: daemon.triggers.ci.url: is required and missing; expected text",
        ),
        (
            '  triggers: {ci: {type: webhook, url: "https://ci", dry_run: "no"}}',
            ("5:62: daemon.triggers.ci.dry_run: expected true or false, found the text 'no'; "
            "leave out the quotes"),
        ),
        (
            '  store: {url: "postgresql://me:hunter2@db/x"}',
            ("5:16: daemon.store.url: a password does not belong in a file; name a variable: "
            "scheme://user:${NAME}@…"),
        ),
        ("  feed: {type: memory}", "5:3: daemon.feed: stands here twice; the first is on line 3"),
        ("  <<: {}", "5:3: daemon: merge keys (`<<`) are not read; name the options themselves"),
        (
            "  windows: {length_seconds: 10, every_seconds: 3}",
            "5:48: daemon.windows.every_seconds: 3.0 does not divide length_seconds 10.0",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_one_line(line: str, said: str) -> None:
    assert problems(f"{DAEMON}{line}\n") == [f"oodmon.yaml:{said}"]


def test_all_problems_of_one_component_at_once() -> None:
    text = DAEMON + "  drift: {a: {type: budget, tolerated: 1, tolerated_fraction: 2}}\n"
    assert problems(text) == [
        (
            "oodmon.yaml:5:29: daemon.drift.a.tolerated: unknown option; "
            "did you mean `tolerated_fraction`?"
        ),
        "oodmon.yaml:5:63: daemon.drift.a.tolerated_fraction: 2.0 is not in [0, 0.5]",
    ]


def test_names_in_rules_are_names_of_entities() -> None:
    text = """\
        model: {name: digits}
        agent: {detectors: {msp: {type: msp}}}
        daemon:
          feed: {type: memory}
          calibration: {path: states/}
          drift: {budget: {type: budget}}
          triggers: {retrain: {type: webhook, url: "https://ci"}}
          rules:
            a: {drift: buget, triggers: [retrian], detectors: [msp, mps]}
        """
    assert problems(text) == [
        (
            "oodmon.yaml:9:16: daemon.rules.a.drift: no drift test is called 'buget'; "
            "did you mean `budget`?"
        ),
        (
            "oodmon.yaml:9:34: daemon.rules.a.triggers: no trigger is called 'retrian'; "
            "did you mean `retrain`?"
        ),
        (
            "oodmon.yaml:9:61: daemon.rules.a.detectors: no detector is called 'mps'; "
            "did you mean `msp`?"
        ),
    ]


def test_a_secret_comes_from_the_environment_alone() -> None:
    literal = "  sinks: {k: {type: kafka, bootstrap_servers: [b], password: hunter2}}\n"
    (said,) = problems(DAEMON + literal)
    assert said.endswith(
        "a secret does not belong in a file; name an environment variable: ${NAME}"
    )
    assert "hunter2" not in said
    variable = literal.replace("hunter2", '"${PASSWORD}"')
    (said,) = problems(DAEMON + variable)
    assert said.endswith("password: environment variable PASSWORD is not set")
    daemon = daemon_of(variable, PASSWORD="hunter2")
    assert daemon.sinks["k"].component.component.password.reveal() == "hunter2"
    assert "hunter2" not in repr(daemon)


def test_variables_are_replaced_in_text_and_numbers_and_never_shown() -> None:
    daemon = daemon_of(
        '  flag_level: "${LEVEL}"\n'
        '  sinks: {log: {type: log, logger: "a.${WHO}.$${b}"}}\n'
        '  store: {url: "postgresql://me:${WORD}@db/x"}\n',
        LEVEL="1e-2",
        WHO="me",
        WORD="hunter2",
    )
    assert daemon.flag_level == 0.01
    assert daemon.sinks["log"].component.component.logger == "a.me.${b}"
    assert daemon.store.url == "postgresql://me:hunter2@db/x"
    assert "hunter2" not in repr(daemon)
    (said,) = problems(DAEMON + '  flag_level: "${LEVEL}"\n', LEVEL="hunter2")
    assert said.endswith("expected a number, found the text that '${LEVEL}' stands for")
    (said,) = problems(DAEMON + '  flag_level: "${LEV"\n')
    assert "as in ${NAME}" in said


def test_a_variable_in_braces_needs_quotes() -> None:
    (said,) = problems(DAEMON + "  store: {url: ${URL}}\n", URL="x")
    assert said.startswith("oodmon.yaml:5:17: not valid YAML: ")
    assert said.endswith("put `${NAME}` in quotes inside `{…}` and `[…]`")


def test_yaml_11_numbers_are_numbers() -> None:
    assert daemon_of("  flag_level: 1e-3\n").flag_level == 0.001
    assert daemon_of("  http: {port: 9_464}\n").http.port == 9464
    daemon = daemon_of("  windows: {length_seconds: 10}\n")
    assert isinstance(daemon.windows.length_seconds, float)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "oodmon.yaml"
    path.parent.mkdir()
    path.write_text(DAEMON)
    daemon = load(path, "daemon").daemon
    assert daemon is not None
    assert daemon.feed.component.path == str(path.parent / "spool")
    assert daemon.calibration.path == str(path.parent / "states")
    assert daemon.store.url == f"sqlite:///{path.parent / 'oodmon.db'}"
    path.write_text(DAEMON + '  store: {url: "sqlite:////abs/x.db"}\n')
    again = load(path, "daemon").daemon
    assert again is not None
    assert again.store.url == "sqlite:////abs/x.db"


def test_defaults() -> None:
    daemon = daemon_of("")
    assert (daemon.flag_level, daemon.http.host, daemon.http.port) == (0.001, "127.0.0.1", 9464)
    assert (daemon.drift, daemon.rules, daemon.sinks, daemon.triggers) == ({}, {}, {}, {})
    guarded = daemon_of('  triggers: {ci: {type: webhook, url: "https://ci"}}\n').triggers["ci"]
    assert (guarded.cooldown_seconds, guarded.daily_quota, guarded.dry_run) == (86_400, 1, True)


def test_what_is_probably_not_meant_is_a_hint() -> None:
    config = loads((DAEMON + "  drift: {lost: {type: ks}}\n").encode(), "daemon")
    assert config.hints == ("daemon.drift.lost: no rule reads it, so it alarms nobody",)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "1:1: the file is empty"),
        (b"# only a comment\n", "1:1: the file is empty"),
        (b"just words", "1:1: expected a map of options, found the text 'just words'"),
        (b"a: 1\nb: \xff", "2:4: byte 0xff is not UTF-8"),
        (b"a: \x07", "1:4: the character U+0007 is not allowed in YAML"),
        (b"a: [1", "1:6: not valid YAML: while parsing a flow sequence"),
        (b"a: 1\n---\nb: 2", "2:1: not valid YAML: expected a single document"),
        (b"{a: 1, [b]: 2}", "1:8: a key must be a single word"),
        (b'a: "\\UFFFFFFFF"', "1:1: not valid YAML: "),
        (b"&a [*a]", "1:1: an alias stands for something that holds the alias itself"),
        (b"[" * (MAX_DEPTH + 1), f"1:{MAX_DEPTH + 1}: more than {MAX_DEPTH} nested levels"),
        (b"#" * (MAX_BYTES + 1), f"1:1: the file holds {MAX_BYTES + 1} bytes"),
        (b"[&a 1" + b", *a" * (MAX_ALIASES + 1) + b"]", f"more than {MAX_ALIASES} aliases"),
        (
            (b"a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
            b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
            b"e: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n"),
            "its aliases unfold to more than the limits allow",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_config(data: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(data, environment={})
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml:1:1: cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_only_the_half_that_is_needed_is_read() -> None:
    text = DAEMON + "agent: {nonsense: 1, detectors: {msp: {type: no_such}}}\n"
    config = loads(text.encode(), "daemon")
    assert isinstance(config, Config)
    assert config.agent is None
    assert config.detectors == ("msp",)
    assert len(problems(text, "agent")) == 4
    assert problems(DAEMON, "agent") == ["oodmon.yaml:1:1: agent: is required and missing"]
    assert problems("model: {name: x}", "both") == [
        "oodmon.yaml:1:1: neither `agent` nor `daemon` is here; one of them is needed"
    ]

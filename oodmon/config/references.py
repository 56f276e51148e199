"""Names that one part of the file uses for entities of another; and what is probably not meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from oodmon.config.document import Problems
from oodmon.config.schema import AgentSection, DaemonSection
from oodmon.labelling import LABELS
from oodmon.registry import near

__all__ = ["check_rules", "detector_ids", "hints"]

Entries = Mapping[str, tuple[yaml.Node, yaml.Node]]


def detector_ids(entries: Entries) -> tuple[str, ...]:
    """The ids in the agent half, read without importing what they name."""
    for name in ("agent", "detectors"):
        node = entries[name][1] if name in entries else None
        if not isinstance(node, yaml.MappingNode):
            return ()
        entries = {k.value: (k, v) for k, v in node.value if isinstance(k, yaml.ScalarNode)}
    return tuple(entries)


def check_rules(entries: Entries, path: str, detectors: frozenset[str], problems: Problems) -> None:
    """Names in rules must be names of entities of this file, broken ones included."""
    known = {
        "drift": _keys(entries, "drift") | ({LABELS} if LABELS in entries else set()),
        "triggers": _keys(entries, "triggers"),
        "detectors": detectors | {"*"} if detectors else frozenset(),
    }
    words = {"drift": "drift test", "triggers": "trigger", "detectors": "detector"}
    rules = entries["rules"][1]
    for rule, options in rules.value if isinstance(rules, yaml.MappingNode) else ():
        for key, value in options.value if isinstance(options, yaml.MappingNode) else ():
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name not in known or (name == "detectors" and not detectors):
                continue
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for item in items:
                if not isinstance(item, yaml.ScalarNode) or "${" in item.value:
                    continue
                if item.value not in known[name]:
                    what = f"no {words[name]} is called {item.value!r}"
                    hint = near(item.value, known[name])
                    problems.add(item, f"{path}.{rule.value}.{name}", what + hint)


def hints(agent: AgentSection | None, daemon: DaemonSection | None) -> tuple[str, ...]:
    """What is allowed and yet probably not meant."""
    told = []
    if daemon is not None:
        fired = {name for rule in daemon.rules.values() for name in rule.triggers}
        tested = {rule.drift for rule in daemon.rules.values()}
        if not daemon.drift:
            told.append("daemon.drift: no drift test, so windows are stored and nothing alarms")
        told += [
            f"daemon.drift.{name}: no rule reads it, so it alarms nobody"
            for name in daemon.drift
            if name not in tested
        ]
        told += [
            f"daemon.triggers.{name}: no rule names it, so it never fires"
            for name in daemon.triggers
            if name not in fired
        ]
        if daemon.rules and not daemon.sinks:
            told.append("daemon.sinks: no sink, so alerts are stored and told to nobody")
    if agent is not None and daemon is not None:
        if agent.feed.component != daemon.feed.component:
            told.append("agent.feed and daemon.feed differ; the daemon may see no scores")
        if Path(agent.states) != Path(daemon.calibration.path):
            told.append("agent.states and daemon.calibration.path are two folders; copy both files")
    return tuple(told)


def _keys(entries: Entries, name: str) -> frozenset[str]:
    node = entries[name][1] if name in entries else None
    if not isinstance(node, yaml.MappingNode):
        return frozenset()
    return frozenset(k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode))

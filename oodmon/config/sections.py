"""The sections of the file, one by one: components through the registry, the rest by fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import yaml

from oodmon.admission import Admission
from oodmon.config.convert import MISSING, Converter
from oodmon.config.references import check_rules, detector_ids, hints
from oodmon.config.schema import (
    AgentSection,
    CalibrationSection,
    Component,
    Config,
    DaemonSection,
    HttpSection,
    LabelsSection,
    ModelSection,
    SinkSection,
    StoreSection,
    TapSection,
    TriggerSection,
)
from oodmon.config.wording import found
from oodmon.errors import OodmonError
from oodmon.extras import install
from oodmon.labelling import LABELS
from oodmon.registry import kinds, near, options_of
from oodmon.rules import Rule
from oodmon.windows import Windowing

__all__ = ["Half", "Sections"]

Half = Literal["agent", "daemon", "both"]

T = TypeVar("T")
Entries = Mapping[str, tuple[yaml.Node, yaml.Node]]

_ID: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_SQLITE: Final = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/|:memory:|file:)(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sections:
    """One pass over one file; what is wrong goes to the converter's problems."""

    convert: Converter
    half: Half
    file: str
    digest: str

    def config(self, root: yaml.Node) -> Config | None:
        """The whole file; nothing after a problem was noted."""
        entries = self.convert.entries(root, "")
        if entries is None:
            return None
        self._only(entries, "", ("model", "agent", "daemon"))
        model = self._part(root, entries, "", "model", self._plain(ModelSection), required=True)
        names = detector_ids(entries)
        wanted = ("agent", "daemon") if self.half == "both" else (self.half,)
        if self.half == "both" and not set(wanted) & set(entries):
            self._problem(root, "", "neither `agent` nor `daemon` is here; one of them is needed")
        required = self.half != "both"
        agent = daemon = None
        if "agent" in wanted:
            agent = self._part(root, entries, "", "agent", self._agent, required=required)
        if "daemon" in wanted:
            daemon = self._part(
                root,
                entries,
                "",
                "daemon",
                lambda node, path: self._daemon(node, path, frozenset(names)),
                required=required,
            )
        if len(self.convert.problems) or model is None:
            return None
        return Config(model, agent, daemon, self.file, names, self.digest, hints(agent, daemon))

    def _agent(self, node: yaml.Node, path: str) -> AgentSection | None:
        entries = self.convert.entries(node, path)
        if entries is None:
            return None
        self._only(entries, path, [f.name for f in dataclasses.fields(AgentSection)])
        tap = self._part(node, entries, path, "tap", self._tap)
        if "tap" not in entries:
            made = self._default("taps", "hooks", node, f"{path}.tap")
            tap = None if made is None else TapSection(made)
        found_detectors = self._part(
            node,
            entries,
            path,
            "detectors",
            lambda n, p: self._map(n, p, lambda m, q: self._component(m, q, "detectors")),
            required=True,
        )
        if found_detectors == {} and not getattr(entries["detectors"][1], "value", ()):
            self._problem(entries["detectors"][1], f"{path}.detectors", "names no detector")
        states = self._part(
            node,
            entries,
            path,
            "states",
            lambda n, p: self.convert.value(n, str, p, is_path=True),
            required=True,
        )
        feed = self._part(node, entries, path, "feed", self._kind("feeds"), required=True)
        checked = self._part(
            node, entries, path, "check_weights", lambda n, p: self.convert.value(n, bool, p)
        )
        if tap is None or found_detectors is None or states is None or feed is None:
            return None
        return AgentSection(tap, found_detectors, states, feed, checked is not False)

    def _tap(self, node: yaml.Node, path: str) -> TapSection | None:
        return self._extended(node, path, "taps", TapSection)

    def _daemon(
        self, node: yaml.Node, path: str, detectors: frozenset[str]
    ) -> DaemonSection | None:
        entries = self.convert.entries(node, path)
        if entries is None:
            return None
        self._only(entries, path, [f.name for f in dataclasses.fields(DaemonSection)])

        def part(name: str, read: Callable[[yaml.Node, str], T | None]) -> T | None:
            return self._part(node, entries, path, name, read)

        feed = self._part(node, entries, path, "feed", self._kind("feeds"), required=True)
        calibration = self._part(
            node, entries, path, "calibration", self._plain(CalibrationSection), required=True
        )
        flag_level = part("flag_level", self._level)
        flag_fdr = part("flag_fdr", self._level)
        windows = part("windows", self._plain(Windowing))
        drift = part("drift", lambda n, p: self._map(n, p, self._kind("drift")))
        rules = part("rules", lambda n, p: self._map(n, p, self._plain(Rule)))
        store = part("store", self._store)
        sinks = part("sinks", lambda n, p: self._map(n, p, self._sink))
        triggers = part("triggers", lambda n, p: self._map(n, p, self._trigger))
        http = part("http", self._plain(HttpSection))
        intake = part("intake", self._plain(Admission))
        labels = part("labels", self._plain(LabelsSection))
        if intake is not None and feed is not None and feed.type != "spool":
            what = "needs a feed of type spool, where what is accepted is kept"
            self._problem(entries["intake"][0], f"{path}.intake", what)
        if drift and LABELS in drift:
            what = "is what rules call the test on labels that come late; choose another id"
            self._problem(entries["drift"][1], f"{path}.drift.{LABELS}", what)
        if "rules" in entries:
            check_rules(entries, f"{path}.rules", detectors, self.convert.problems)
        if feed is None or calibration is None:
            return None
        return DaemonSection(
            feed=feed,
            calibration=calibration,
            flag_level=0.001 if flag_level is None else flag_level,
            flag_fdr=flag_fdr or 0.0,
            windows=windows or Windowing(),
            drift=drift or {},
            rules=rules or {},
            store=store or StoreSection(self._sqlite(StoreSection().url)),
            sinks=sinks or {},
            triggers=triggers or {},
            http=http or HttpSection(),
            intake=intake,
            labels=labels,
        )

    def _level(self, node: yaml.Node, path: str) -> float | None:
        level = self.convert.value(node, float, path)
        if level is MISSING:
            return None
        if not 0.0 < level < 1.0:
            self._problem(node, path, f"{level} is not in (0, 1)")
        return float(level)

    def _store(self, node: yaml.Node, path: str) -> StoreSection | None:
        store = self._plain(StoreSection)(node, path)
        return None if store is None else dataclasses.replace(store, url=self._sqlite(store.url))

    def _sqlite(self, url: str) -> str:
        relative = _SQLITE.fullmatch(url)
        if relative is None:
            return url
        return relative.group(1) + str(self.convert.folder / relative.group(2))

    def _sink(self, node: yaml.Node, path: str) -> SinkSection | None:
        return self._extended(node, path, "sinks", SinkSection)

    def _trigger(self, node: yaml.Node, path: str) -> TriggerSection | None:
        return self._extended(node, path, "triggers", TriggerSection)

    def _extended(self, node: yaml.Node, path: str, kind: str, section: type[T]) -> T | None:
        """A component whose map also holds options of the section that it stands in."""
        own = {name: o for name, o in options_of(section).items() if name != "component"}
        component = self._component(node, path, kind, beside=tuple(own))
        if not isinstance(node, yaml.MappingNode):
            return None
        entries = self.convert.entries(node, path) or {}
        given = {name: pair for name, pair in entries.items() if name in own}
        values, complete = self.convert.options(node, given, own, path)
        made = self.convert.construct(
            section,
            {"component": component, **values},
            node,
            given,
            path,
            complete=complete and component is not None,
        )
        return None if made is MISSING else made

    def _kind(self, kind: str) -> Callable[[yaml.Node, str], Component | None]:
        return lambda node, path: self._component(node, path, kind)

    def _component(
        self, node: yaml.Node, path: str, kind: str, *, beside: tuple[str, ...] = ()
    ) -> Component | None:
        """An entity with a `type`; `beside` are options of its section, not of the component."""
        if not isinstance(node, yaml.MappingNode):
            what = f"expected a map such as {{type: …}}, found {found(node)}"
            self._problem(node, path, what)
            return None
        entries = dict(self.convert.entries(node, path) or {})
        if "type" not in entries:
            names = ", ".join(kinds[kind].names())
            self._problem(node, f"{path}.type", f"is required and missing; one of {names}")
            return None
        _, type_node = entries.pop("type")
        type_name = self.convert.value(type_node, str, f"{path}.type")
        if type_name is MISSING:
            return None
        try:
            cls = kinds[kind].get(type_name)
            known = options_of(cls)
        except OodmonError as error:
            self._problem(type_node, f"{path}.type", _with_extra(str(error)))
            return None
        except (TypeError, NameError) as error:
            what = f"the options of {type_name!r} cannot be told: {error}"
            self._problem(type_node, f"{path}.type", what)
            return None
        own = {n: pair for n, pair in entries.items() if n in known or n not in beside}
        values, complete = self.convert.options(node, own, known, path, ignore=beside)
        made = self.convert.construct(cls, values, node, own, path, complete=complete)
        if made is MISSING:
            return None
        return Component(path.rpartition(".")[2], kind, type_name, made)

    def _default(self, kind: str, name: str, node: yaml.Node, path: str) -> Component | None:
        try:
            return Component(path.rpartition(".")[2], kind, name, kinds[kind].create(name))
        except (OodmonError, TypeError) as error:
            self._problem(node, path, _with_extra(str(error)))
            return None

    def _plain(self, section: type[T]) -> Callable[[yaml.Node, str], T | None]:
        def read(node: yaml.Node, path: str) -> T | None:
            made = self.convert.instance(node, section, path)
            return None if made is MISSING else made

        return read

    def _map(
        self, node: yaml.Node, path: str, read: Callable[[yaml.Node, str], T | None]
    ) -> dict[str, T] | None:
        """Ids to entities, in file order."""
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return {}
        entries = self.convert.entries(node, path)
        if entries is None:
            return None
        made: dict[str, T] = {}
        for name, (key, value) in entries.items():
            if not _ID.fullmatch(name):
                what = "an id is 1 to 64 letters, digits, `_` or `-`, the first no digit"
                self._problem(key, f"{path}.{name}", what)
                continue
            entity = read(value, f"{path}.{name}")
            if entity is not None:
                made[name] = entity
        return made

    def _part(
        self,
        node: yaml.Node,
        entries: Entries,
        path: str,
        name: str,
        read: Callable[[yaml.Node, str], T | None],
        *,
        required: bool = False,
    ) -> T | None:
        full = f"{path}.{name}" if path else name
        if name in entries:
            made = read(entries[name][1], full)
            return None if made is MISSING else made
        if required:
            self._problem(node, full, "is required and missing")
        return None

    def _only(self, entries: Entries, path: str, known: Iterable[str]) -> None:
        for name, (key, _) in entries.items():
            if name not in known:
                full = f"{path}.{name}" if path else name
                self._problem(key, full, f"unknown section{near(name, known)}")

    def _problem(self, place: yaml.Node, path: str, what: str) -> None:
        self.convert.problems.add(place, path, what)


def _with_extra(message: str) -> str:
    """The message, with the extra to install where a client library is what is missing."""
    missing = re.search(r"No module named '(\w+)", message)
    how = install(missing.group(1)) if missing else ""
    return f"{message}; install it with: {how}" if how else message

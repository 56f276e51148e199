"""Names → classes, one registry per kind of component.

A name is looked up in this order: already registered; the module of that name in the kind's
folder; an entry point of that name in the group ``oodmon.<kind>``; any module of the folder, which
imports them all. Built-ins register with the same decorator as plugins. Nothing is imported before
the first look-up.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, TypeVar, cast

from oodmon.contracts import Detector, DriftTest, Feed, Sink, Tap, Trigger
from oodmon.errors import BrokenPlugin, ContractError, NameTaken, UnknownName

__all__ = [
    "Registry",
    "detectors",
    "drift",
    "feeds",
    "kinds",
    "names_path",
    "near",
    "options_of",
    "sinks",
    "taps",
    "triggers",
]

C = TypeVar("C")
K = TypeVar("K")

_PATHS: Final = ("_path", "_file", "_folder", "_cafile", "_certfile", "_keyfile")


def near(word: str, known: Iterable[str]) -> str:
    """``; did you mean `x`?`` where something like `word` is known, else nothing."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{found[0]}`?" if found else ""


class Registry(Generic[C]):
    """The classes of one kind.

    Args:
        kind: the folder below `oodmon`, the YAML section and the entry-point suffix.
        contract: the abstract class that every member derives from.
    """

    def __init__(self, kind: str, contract: type[C]) -> None:
        self.kind = kind
        self.contract = contract
        self._classes: dict[str, type[C]] = {}
        self._broken: dict[str, str] = {}
        self._folder_read = False

    def register(self, name: str) -> Callable[[type[K]], type[K]]:
        """Class decorator: give the class this name. `NameTaken` if another class has it."""

        def decorate(cls: type[K]) -> type[K]:
            owner = self._classes.get(name)
            if owner is not None and _path(owner) != _path(cls):
                raise NameTaken(
                    f"{self.kind}: {name!r} is claimed by {_path(owner)} and by {_path(cls)}"
                )
            if not issubclass(cls, self.contract):
                raise ContractError(f"{_path(cls)} does not derive from {_path(self.contract)}")
            component: Any = cls
            component.name = name
            self._classes[name] = component
            return cast("type[K]", component)

        return decorate

    def get(self, name: str) -> type[C]:
        """The class of this name; `UnknownName` suggests near ones, `BrokenPlugin` says why."""
        if name not in self._classes:
            module = f"oodmon.{self.kind}.{name}"
            if name.isidentifier() and importlib.util.find_spec(module) is not None:
                self._import(module, name)
        if name not in self._classes:
            for point in self._entry_points():
                if point.name == name:
                    self._load(point)
        if name not in self._classes and name not in self._broken:
            self._read_folder()
        if name in self._classes:
            return self._classes[name]
        if name in self._broken:
            raise BrokenPlugin(f"{self.kind}: {name!r} cannot be used: {self._broken[name]}")
        hint = near(name, self.names()) or f"; `oodmon catalog {self.kind}` lists them"
        raise UnknownName(f"{self.kind}: nothing is called {name!r}{hint}")

    def create(self, name: str, /, **options: Any) -> C:
        """An instance with these options; `ContractError` names an option that it does not have."""
        cls = self.get(name)
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        for option in options:
            if option not in known:
                hint = near(option, known)
                raise ContractError(f"{self.kind}.{name}.{option}: unknown option{hint}")
        return cls(**options)

    def names(self) -> list[str]:
        """Every name that can be used, sorted."""
        self._read_all()
        return sorted(self._classes)

    def broken(self) -> Mapping[str, str]:
        """Name (or module) → why it cannot be imported."""
        self._read_all()
        return dict(self._broken)

    def _read_all(self) -> None:
        self._read_folder()
        for point in self._entry_points():
            if point.name not in self._classes:
                self._load(point)

    def _read_folder(self) -> None:
        if self._folder_read:
            return
        package = importlib.import_module(f"oodmon.{self.kind}")
        for info in pkgutil.iter_modules(package.__path__):
            self._import(f"{package.__name__}.{info.name}", info.name)
        self._folder_read = True

    def _import(self, module: str, name: str) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            self._broken[name] = f"{module}: {error}"

    def _entry_points(self) -> list[EntryPoint]:
        return list(entry_points(group=f"oodmon.{self.kind}"))

    def _load(self, point: EntryPoint) -> None:
        try:
            cls = point.load()
        except Exception as error:
            self._broken[point.name] = f"{point.value}: {type(error).__name__}: {error}"
        else:
            self.register(point.name)(cls)


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def names_path(name: str) -> bool:
    """Whether an option of this name holds a file or a folder, by the naming rule of options."""
    return name == "path" or name.endswith(_PATHS)


def options_of(cls: type[Any]) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Option → (field, annotation) of a dataclass; `TypeError` where that cannot be told."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{_path(cls)} is not a dataclass")
    options = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints: dict[str, Any] = {}
    for owner in reversed(cls.__mro__):
        # Only the options: what else a class keeps may be annotated with names that exist for
        # the type checker alone.
        own = {n: a for n, a in inspect.get_annotations(owner).items() if n in options}
        holder = type("Options", (), {"__annotations__": own, "__module__": owner.__module__})
        hints |= typing.get_type_hints(holder, include_extras=True)
    return {name: (option, hints[name]) for name, option in options.items()}


taps: Registry[Tap] = Registry("taps", Tap)  # type: ignore[type-abstract]
detectors: Registry[Detector] = Registry("detectors", Detector)  # type: ignore[type-abstract]
feeds: Registry[Feed] = Registry("feeds", Feed)  # type: ignore[type-abstract]
drift: Registry[DriftTest[Any]] = Registry("drift", DriftTest)  # type: ignore[type-abstract]
sinks: Registry[Sink] = Registry("sinks", Sink)  # type: ignore[type-abstract]
triggers: Registry[Trigger] = Registry("triggers", Trigger)  # type: ignore[type-abstract]

kinds: Mapping[str, Registry[Any]] = {
    registry.kind: registry for registry in (taps, detectors, feeds, drift, sinks, triggers)
}
"""Kind → registry, in the order of the flow."""

"""Forward hooks on named modules of a running model.

Two hooks on the model itself open and close a visit per forward pass; one hook per layer copies
what its module saw (`oodmon.taps.reader` has them). Here is what is hooked, and where.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn
from torch.utils.hooks import RemovableHandle

from oodmon.contracts import Intake, Reads, Tap
from oodmon.errors import ContractError
from oodmon.registry import taps
from oodmon.taps.layout import Layout, Place, discover, locate
from oodmon.taps.reader import LOGITS, EndHook, InputHook, OutputHook, Reader, StartHook
from oodmon.taps.twin import Twin

__all__ = ["Hooked", "Hooks"]

log = logging.getLogger(__name__)

AUTO: Final = "auto"


@taps.register("hooks")
@dataclass(frozen=True)
class Hooks(Tap):
    """Reads the outputs or inputs of named modules through forward hooks.

    Options
        layers           `auto` finds head, penultimate features and stages; else layer specs
                         (`layer3`, `fc.input`) or names for them (`features=fc.input`)
        logits           `auto` finds the (B, C) tensor in the model's output; else a layer spec
        overhead_budget  share of serving time that tapping and scoring may cost, (0, 1];
                         1 reads every pass
    """

    layers: str | tuple[str, ...] = AUTO
    logits: str = AUTO
    overhead_budget: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.overhead_budget <= 1.0:
            raise ContractError(
                f"taps.hooks.overhead_budget: {self.overhead_budget} is not in (0, 1]"
            )

    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Hooked:
        """Hook what the detectors read, and nothing else.

        A layer that a detector reads is looked up among the names given in `layers`, then among
        those that `auto` finds, then as a layer spec of its own. No layers read at all means all
        that `layers` names. `ContractError` names the layer and what there is.
        """
        # A compiled model is a shell around the module whose children can be hooked.
        inner = getattr(model, "_orig_mod", model)
        if not isinstance(inner, nn.Module):
            raise ContractError(f"a tap needs a torch.nn.Module, found {type(model).__name__}")
        given, layout = self._names(inner)
        wanted = reads.layers
        places = {name: _resolve(inner, name, given, layout) for name in wanted}
        found = list(layout.lines) if layout is not None else []
        found += [f"{name}: reads {_words(place)}" for name, place in places.items()]
        logits: Place | None = None
        if reads.logits and self.logits != AUTO:
            logits = locate(inner, given.get(self.logits, self.logits))
            found.append(f"logits: reads {_words(logits)}")
        elif reads.logits:
            found.append("logits: the (B, C) tensor in the model's output")
        for place in {*places.values(), *([logits] if logits else [])}:
            note = _fast_path_note(inner, place)
            if note:
                found.append(note)
        if inner is not model or getattr(model, "_compiled_call_impl", None) is not None:
            found.append(
                "the model is compiled: attach before its first pass, or what was compiled already "
                "runs on without the hooks"
            )
        reader = Reader(
            intake,
            classes=layout.classes if layout is not None else 0,
            output_logits=reads.logits and logits is None,
            inputs=reads.inputs,
        )
        if logits is not None:
            places[LOGITS] = logits
        hooked = Hooked(tuple(found), _install(reader, model, inner, places))
        for line in found:
            log.info("%s", line)
        return hooked

    def offers(self, model: nn.Module) -> tuple[str, ...]:
        """The layer names that `layers` stands for in this model."""
        given, layout = self._names(getattr(model, "_orig_mod", model))
        return tuple(dict.fromkeys([*given, *(layout.names if layout is not None else ())]))

    def twin(self, model: nn.Module, *, keep: bool = True) -> Twin:
        """For further passes, whose layers and logits are found and called as here."""
        given, layout = self._names(getattr(model, "_orig_mod", model))
        return Twin(
            model,
            lambda inner, name: _resolve(inner, name, given, layout),
            layout.classes if layout is not None else 0,
            "" if self.logits == AUTO else given.get(self.logits, self.logits),
            keep=keep,
        )

    def _names(self, model: nn.Module) -> tuple[dict[str, str], Layout | None]:
        entries = (self.layers,) if isinstance(self.layers, str) else self.layers
        given: dict[str, str] = {}
        layout = discover(model) if AUTO in entries else None
        for entry in entries:
            if entry == AUTO:
                continue
            name, equals, spec = entry.partition("=")
            spec = spec.strip() if equals else name.strip()
            locate(model, spec)
            given[name.strip()] = spec
        return given, layout


def _resolve(model: nn.Module, name: str, given: dict[str, str], layout: Layout | None) -> Place:
    if name in given:
        return locate(model, given[name])
    if layout is not None and name in layout.names:
        return locate(model, layout.names[name])
    known = [*given, *(layout.names if layout is not None else ())]
    return locate(model, name, known)


def _words(place: Place) -> str:
    return f"the {place.side} of {place.path}"


def _fast_path_note(model: nn.Module, place: Place) -> str:
    """A hook switches PyTorch's fused transformer layer off, which changes the last digits."""
    path = place.path
    while path:
        if isinstance(model.get_submodule(path), nn.TransformerEncoderLayer):
            return (
                f"{place}: a hook inside {path} turns off the fused inference path of "
                "TransformerEncoderLayer; read the whole encoder to keep it"
            )
        path = path.rpartition(".")[0]
    return ""


class Hooked:
    """A model whose forward passes are read until `detach`."""

    def __init__(self, found: tuple[str, ...], handles: list[RemovableHandle]) -> None:
        self.found = found
        self._handles = handles

    def detach(self) -> None:
        """Take every hook off again. Passes that run just now are still read to their end."""
        while self._handles:
            self._handles.pop().remove()


def _install(
    reader: Reader, model: nn.Module, inner: nn.Module, places: Mapping[str, Place]
) -> list[RemovableHandle]:
    handles = []
    for name, place in places.items():
        module = inner.get_submodule(place.path)
        if place.side == "input":
            hook = InputHook(reader, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(OutputHook(reader, name)))
    # Opened before any other hook of the model runs, closed after all of them, even after one of
    # them or the model itself raised: no pass is left open in its thread.
    handles.append(
        model.register_forward_pre_hook(StartHook(reader), with_kwargs=True, prepend=True)
    )
    handles.append(model.register_forward_hook(EndHook(reader), always_call=True))
    return handles

"""Taps that break one promise each, so that the checks can be seen to notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oodmon.checks import taps as checks
from oodmon.contracts import Attached, Intake, Reads, Tap
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.taps.hooks import Hooks
from oodmon.taps.layout import locate
from oodmon.taps.twin import Twin


@dataclass
class Handles:
    handles: list[RemovableHandle] = field(default_factory=list)
    found: tuple[str, ...] = ()

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class LeavesAHook(Tap):
    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        model.register_forward_hook(lambda *_: None)
        return Hooks().attach(model, reads, intake)


@dataclass(frozen=True)
class LeavesAnAttribute(Tap):
    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        model.forward = model.forward
        return Hooks().attach(model, reads, intake)


@dataclass(frozen=True)
class ChangesTheLastBit(Tap):
    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        attached = Hooks().attach(model, reads, intake)
        handle = model.register_forward_hook(lambda _module, _args, out: out * 1.0000001)
        return _Both(attached, handle)


@dataclass(frozen=True)
class CutsTheGradient(Tap):
    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        attached = Hooks().attach(model, reads, intake)
        handle = model.register_forward_hook(lambda _module, _args, out: out.detach())
        return _Both(attached, handle)


@dataclass(frozen=True)
class ReadsItselfForATwin(Hooks):
    """Its further passes are the served model's own, with batch norms that learn from them."""

    def twin(self, model: nn.Module, *, keep: bool = True) -> Twin:
        model.train()
        model(torch.zeros(3, 6))
        model.eval()
        return super().twin(model, keep=keep)


@dataclass(frozen=True)
class CallsAnotherLayerSo(Hooks):
    def twin(self, model: nn.Module, *, keep: bool = True) -> Twin:
        return Twin(model, lambda inner, _name: locate(inner, "act"), keep=keep)


@dataclass
class _Both:
    inner: Attached
    handle: RemovableHandle

    @property
    def found(self) -> tuple[str, ...]:
        return self.inner.found

    def detach(self) -> None:
        self.inner.detach()
        self.handle.remove()


@dataclass(frozen=True)
class Naive(Tap):
    """Hooks as one writes them first: one shared place, references, nothing caught."""

    copies: bool = False
    admits: bool = True
    validates: bool = True

    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        modules = dict(model.named_modules())
        seen: dict[str, Tensor] = {}
        for name in reads.layers:
            if self.validates and name not in modules:
                raise ContractError(f"no layer {name!r}")
        kept = self._keep

        def read(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
                seen[name] = kept(out)

            return hook

        def end(_module: nn.Module, args: Any, out: Tensor) -> None:
            visit = intake.admit(len(args[0])) if self.admits else None
            if visit is None and self.admits:
                return
            acts = Activations(layers=dict(seen), logits=kept(out))
            intake.take(visit, acts, 0.0)  # type: ignore[arg-type]

        handles = [
            modules[name].register_forward_hook(read(name))
            for name in reads.layers
            if name in modules
        ]
        handles.append(model.register_forward_hook(end))
        return Handles(handles)

    def _keep(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if self.copies else tensor.detach()


@dataclass(frozen=True)
class SwallowsExceptions(Tap):
    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        forward = model.forward

        def quiet(*args: Any) -> Any:
            try:
                return forward(*args)
            except ArithmeticError:
                return args[0]

        model.forward = quiet
        return Hooks().attach(model, reads, intake)


@dataclass(frozen=True)
class NeverClosesAPass(Tap):
    """A visit that an exception leaves open takes the place of the next one."""

    def attach(self, model: nn.Module, reads: Reads, intake: Intake) -> Attached:
        return Hooks().attach(model, reads, _Once(intake))


@dataclass
class _Once:
    inner: Intake
    busy: bool = False

    def admit(self, rows: int) -> Any:
        if self.busy:
            return None
        self.busy = True
        return self.inner.admit(rows)

    def take(self, visit: Any, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        self.busy = False
        self.inner.take(visit, acts, tap_seconds, remark)

    def fail(self, visit: Any, rows: int, why: str) -> None:
        self.inner.fail(visit, rows, why)

    def room(self) -> bool:
        return self.inner.room()


BROKEN: Mapping[Callable[[Tap], None], Sequence[Tap]] = {
    checks.check_detach_restores_the_model: (LeavesAHook(), LeavesAnAttribute()),
    checks.check_outputs_are_equal_with_and_without: (ChangesTheLastBit(), CutsTheGradient()),
    checks.check_nothing_raises_into_the_model: (Naive(copies=True),),
    checks.check_the_models_own_exception_passes: (SwallowsExceptions(), NeverClosesAPass()),
    checks.check_values_are_read_as_they_were: (Naive(),),
    checks.check_passes_that_are_not_admitted_are_not_read: (Naive(copies=True, admits=False),),
    checks.check_missing_layers_are_named_when_attached: (Naive(copies=True, validates=False),),
    checks.check_threads_do_not_mix: (Naive(copies=True),),
    checks.check_a_twin_answers_as_the_model: (ReadsItselfForATwin(), CallsAnotherLayerSo()),
}

"""What the hooks do in the serving thread: open a visit, copy activations, hand them over.

The visit lives in a thread-local, so threads that call the model at once do not meet, and a pass
that the intake does not admit costs one attribute look-up per hook. Nothing here raises into the
model and nothing waits, neither for a lock nor for a device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from oodmon.contracts import Intake, Visit
from oodmon.records import Activations
from oodmon.taps.outputs import find_logits, first_floating, first_tensor, shapes

__all__ = ["LOGITS", "EndHook", "InputHook", "OutputHook", "Reader", "StartHook"]

log = logging.getLogger(__name__)

LOGITS: Final = "\0logits"
"""Name of the logits where they are read from a layer; no module path can be this."""

_MOST_NESTED: Final = 4
"""Visits open at once in one thread. More means that passes ended without their closing hook (an
interrupt tore them down), and what they hold is let go."""

_NAMED: Final = 3
"""Modules that are named where there may be many."""


class _Open:
    """One forward pass in this thread; without a visit it is one that is passed by."""

    __slots__ = ("depth", "inputs", "layers", "parent", "remark", "rows", "seconds", "visit")

    def __init__(self, visit: Visit | None, parent: _Open | None, rows: int) -> None:
        self.visit = visit
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.parent: _Open | None = parent if self.depth < _MOST_NESTED else None
        if self.parent is None:
            self.depth = 0
        self.rows = rows
        self.layers: dict[str, Tensor] = {}
        self.inputs: Tensor | None = None
        self.seconds = 0.0
        self.remark = ""


class _Local(threading.local):
    current: _Open | None = None


class _Mode:
    """Whether the model was found to run in training mode, once for all threads."""

    __slots__ = ("looked",)

    def __init__(self) -> None:
        self.looked = False

    def remark(self, model: nn.Module) -> str:
        """What is wrong with serving in training mode; "" where nothing is, or where it was told.

        Detectors learn in evaluation mode. Dropout and batch norms answer otherwise in training.
        """
        if self.looked or not model.training:
            return ""
        self.looked = True
        acting = [path for path, module in model.named_modules() if _acts_otherwise(module)]
        if not acting:
            return ""
        return (
            f"the model runs in training mode, in which {len(acting)} of its modules "
            f"({', '.join(acting[:_NAMED])}{', …' if len(acting) > _NAMED else ''}) answer "
            "otherwise than when its detectors learnt, in evaluation mode; call model.eval() "
            "before serving"
        )


def _acts_otherwise(module: nn.Module) -> bool:
    """Whether it is in training mode and does there what it does not do in evaluation mode."""
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0.0
    return isinstance(module, _NormBase) and module.track_running_stats


@dataclass(frozen=True)
class Reader:
    """Reads the passes of one model for one intake.

    Args:
        classes: C where the head is known, else 0; tells logits from features in an output.
        output_logits: look for logits in the model's output.
        inputs: keep the model's first tensor argument.
    """

    intake: Intake
    classes: int = 0
    output_logits: bool = True
    inputs: bool = False
    local: _Local = field(default_factory=_Local)
    mode: _Mode = field(default_factory=_Mode)

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: ask whether this pass is to be read."""
        local = self.local
        try:
            main = args[0] if args else None
            if not isinstance(main, Tensor):
                main = first_tensor(args, kwargs)
            rows = main.shape[0] if main is not None and main.ndim else 0
            visit = self.intake.admit(rows)
            parent = local.current
            if visit is None:
                if parent is not None:  # a pass inside a pass: the outer visit must not read it
                    local.current = _Open(None, parent, rows)
                return
            begun = perf_counter()
            opened = local.current = _Open(visit, parent, rows)
            if self.inputs and main is not None:
                # The caller may reuse its buffer while the copy waits to be scored.
                opened.inputs = main.detach().clone()
            opened.seconds = perf_counter() - begun
        except Exception:
            log.exception("the tap failed at the start of a forward pass")

    def read(self, opened: _Open, name: str, value: Any) -> None:
        """In a layer's hook: copy its activations."""
        begun = perf_counter()
        try:
            tensor = first_floating(value)
            if tensor is None:
                opened.remark = f"layer {name!r}: expected a floating tensor, found {shapes(value)}"
            else:
                # A copy, not a reference: a ReLU that works in place may be next, and an inference
                # tensor has no version counter that would tell. A module that runs several times
                # in one pass is read at its last call.
                opened.layers[name] = tensor.detach().clone()
        except Exception as error:
            opened.remark = f"layer {name!r}: {type(error).__name__}: {error}"
        opened.seconds += perf_counter() - begun

    def end(self, output: Any, model: nn.Module) -> None:
        """After the model's forward, or after an exception in it: then there is no output."""
        local = self.local
        opened = local.current
        if opened is None:
            return
        local.current = opened.parent
        visit = opened.visit
        if visit is None:
            return
        begun = perf_counter()
        try:
            if output is None:
                self.intake.fail(visit, opened.rows, "")
                return
            acts = self._activations(opened, visit, output)
            if acts.rows == 0 and opened.rows:
                self.intake.fail(visit, opened.rows, opened.remark or "nothing could be read")
                return
            remark = opened.remark or self.mode.remark(model)
            spent = opened.seconds + perf_counter() - begun
            self.intake.take(visit, acts, spent, remark)
        except Exception as error:
            with contextlib.suppress(Exception):
                self.intake.fail(visit, opened.rows, f"{type(error).__name__}: {error}")

    def _activations(self, opened: _Open, visit: Visit, output: Any) -> Activations:
        layers = opened.layers
        logits = layers.pop(LOGITS, None)
        if self.output_logits:
            found = find_logits(output, self.classes)
            if found is None:
                opened.remark = f"logits: expected a floating (B, C), found {shapes(output)}"
            else:
                # Whoever called the model owns its output and may write to it.
                logits = found.detach().clone()
        rows = opened.rows if logits is None else logits.shape[0]
        if rows:
            for name in [n for n, t in layers.items() if not t.ndim or t.shape[0] != rows]:
                # Time first, or windows of an image: there is no row per sample to score.
                shape = tuple(layers.pop(name).shape)
                opened.remark = f"layer {name!r}: expected {rows} rows, found shape {shape}"
        inputs = opened.inputs
        if inputs is not None and rows and inputs.shape[0] != rows:
            opened.remark = f"inputs: expected {rows} rows, found shape {tuple(inputs.shape)}"
            inputs = None
        return Activations(
            layers=layers, logits=logits, inputs=inputs, observed_at=visit.observed_at
        )


class _Callback:
    """A hook that leaves the model copyable and picklable: the copy's hooks do nothing.

    Hooks lead to locks and threads. A model that is deep-copied (moving averages) or saved whole
    must still be both, and loading it must not need oodmon.
    """

    __slots__ = ("_reader",)

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __reduce__(self) -> Any:
        # `nullcontext().__exit__` takes any arguments and returns None: an idle hook.
        return getattr, (contextlib.nullcontext(), "__exit__")


class StartHook(_Callback):
    """Forward pre-hook of the model."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the visit."""
        del module
        self._reader.start(args, kwargs)


class EndHook(_Callback):
    """Forward hook of the model, called always."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the visit."""
        del args
        self._reader.end(output, module)


class _LayerHook(_Callback):
    __slots__ = ("_name",)

    def __init__(self, reader: Reader, name: str) -> None:
        super().__init__(reader)
        self._name = name


class OutputHook(_LayerHook):
    """Forward hook of a layer that is read at its output."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Copy the output."""
        del module, args
        opened = self._reader.local.current
        if opened is not None and opened.visit is not None:
            self._reader.read(opened, self._name, output)


class InputHook(_LayerHook):
    """Forward pre-hook of a layer that is read at its input."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the first floating argument."""
        del module
        opened = self._reader.local.current
        if opened is not None and opened.visit is not None:
            self._reader.read(opened, self._name, (args, kwargs))


for _hook in (StartHook, EndHook, OutputHook, InputHook):
    # What `torch.compiler.disable` sets, without its import of the whole compiler (seconds) and
    # without its wrapper (microseconds a call): dynamo breaks the graph here and runs the hook.
    vars(_hook)["__call__"]._torchdynamo_disable = True

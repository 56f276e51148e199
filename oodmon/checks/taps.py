"""What every tap has to hold to: the model does not notice it, and it reads what was there."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from oodmon.checks import examples_of
from oodmon.contracts import Attached, Reads, Tap, Visit
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["CHECKS", "cases"]

_ROWS: Final = 5
_WIDTH: Final = 6
_CLASSES: Final = 3
_THREADS: Final = 4
_PASSES: Final = 25
_READS: Final = Reads(layers=("hidden",), logits=True)


class _Model(nn.Module):
    """A classifier with what makes reading hard: work in place, batch statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(_WIDTH, 8)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if bool(torch.isinf(x).any()):
            raise ArithmeticError("the model's own")
        logits: Tensor = self.head(self.drop(self.norm(self.act(self.hidden(x)))))
        return logits


@dataclasses.dataclass(frozen=True, slots=True)
class _Visit:
    observed_at: int = 1
    rows: int = 0


class _Recorder:
    """An intake that keeps everything, in any thread."""

    def __init__(self, admit: Callable[[], bool] = lambda: True) -> None:
        self.wanted = admit
        self.taken: list[Activations] = []
        self.failed: list[str] = []

    def admit(self, rows: int) -> Visit | None:
        return _Visit(rows=rows) if self.wanted() else None

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        del visit, tap_seconds, remark
        self.taken.append(acts)

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        del visit, rows
        self.failed.append(why)

    def room(self) -> bool:
        return True


class _Hostile(_Recorder):
    """An intake that breaks its own promise at one place; a tap must stand even that."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def admit(self, rows: int) -> Visit | None:
        if self.where == "admit":
            raise RuntimeError("admit")
        return super().admit(rows)

    def take(self, visit: Visit, acts: Activations, tap_seconds: float, remark: str = "") -> None:
        del visit, acts, tap_seconds, remark
        raise RuntimeError("take")

    def fail(self, visit: Visit, rows: int, why: str) -> None:
        del visit, rows, why
        raise RuntimeError("fail")


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return _Model().eval()


def _inputs(seed: int = 0) -> Tensor:
    return torch.randn(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(seed))


def _drive(attached: Attached, model: nn.Module, inputs: Tensor) -> Tensor:
    """One pass; a tap that does not read a running model is told to play as well."""
    with torch.no_grad():
        output: Tensor = model(inputs)
    play = getattr(attached, "play", None)
    if play is not None:
        play()
    return output


def cases(cls: type[Tap]) -> list[Tap]:
    """Instances with the options of `cls.examples()`; a `path` is filled with recorded passes."""
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made = []
    for chosen in examples_of(cls):
        arguments = dict(chosen)
        if "path" in fields and "path" not in arguments:
            arguments["path"] = str(_recording())
        made.append(cls(**arguments))
    return made


def _recording() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="oodmon-check-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model, inputs = _model(), _inputs()
    with torch.no_grad():
        hidden = model.get_submodule("hidden")(inputs)
        logits = model(inputs)
    path = folder / "passes.npz"
    arrays = {"layers.hidden": hidden.numpy(), "logits": logits.numpy()}
    np.savez(path, **arrays)
    return path


def _anatomy(model: nn.Module) -> dict[str, dict[str, str]]:
    """Everything that a module holds, with the tensors by value and the rest by identity."""
    return {
        name: {key: _describe(value) for key, value in sorted(vars(module).items())}
        for name, module in model.named_modules()
    }


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {value.detach().cpu().numpy().tobytes().hex()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_describe(each)}' for key, each in value.items())}}}"
    if isinstance(value, nn.Module):
        return f"module {id(value)}"
    return repr(value)


def check_detach_restores_the_model(tap: Tap) -> None:
    """After `detach` no hook, attribute or bit is left changed; a second `detach` does nothing."""
    model = _model()
    before = _anatomy(model)
    attached = tap.attach(model, _READS, _Recorder())
    _drive(attached, model, _inputs())
    attached.detach()
    attached.detach()
    after = _anatomy(model)
    assert after.keys() == before.keys(), "modules were added or removed"
    for name, parts in before.items():
        for key in parts.keys() | after[name].keys():
            was, now = parts.get(key), after[name].get(key)
            assert was == now, f"module {name or 'root'!r}: `{key}` was {was}, is {now}"


def check_outputs_are_equal_with_and_without(tap: Tap) -> None:
    """The model answers the same, bit for bit, in eval and in train mode, with and without grad."""
    for training in (False, True):
        for grad in (False, True):
            plain, tapped = _model().train(training), _model().train(training)
            attached = tap.attach(tapped, _READS, _Recorder())
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
                torch.manual_seed(1)
                expected = plain(_inputs())
                torch.manual_seed(1)
                found = tapped(_inputs())
            attached.detach()
            mode = "train" if training else "eval"
            assert torch.equal(expected, found), f"{mode} mode: outputs differ with the tap"
            assert found.requires_grad == grad, f"{mode} mode: requires_grad is not {grad}"
            for (name, one), other in zip(
                plain.state_dict().items(), tapped.state_dict().values(), strict=True
            ):
                assert torch.equal(one, other), f"{mode} mode: {name} differs after a tapped pass"


def check_nothing_raises_into_the_model(tap: Tap) -> None:
    """An intake that raises, wherever it does, leaves the forward pass as it is."""
    expected = _model()(_inputs())
    for where in ("admit", "take"):
        model = _model()
        attached = tap.attach(model, _READS, _Hostile(where))
        try:
            with torch.no_grad():
                found = model(_inputs())
        except RuntimeError as error:
            raise AssertionError(f"an exception in `{where}` reached the model: {error}") from error
        finally:
            attached.detach()
        assert torch.equal(expected, found), f"outputs differ when `{where}` raises"


def check_the_models_own_exception_passes(tap: Tap) -> None:
    """What the model raises comes out unchanged, and the pass after it is read as ever."""
    model, recorder = _model(), _Recorder()
    attached = tap.attach(model, _READS, recorder)
    bad = torch.full((_ROWS, _WIDTH), float("inf"))
    try:
        try:
            model(bad)
        except ArithmeticError:
            pass
        else:
            raise AssertionError("the model's exception did not come out")
        recorder.taken.clear()
        _drive(attached, model, _inputs())
        assert len(recorder.taken) == 1, f"{len(recorder.taken)} passes read after an exception"
    finally:
        attached.detach()


def check_values_are_read_as_they_were(tap: Tap) -> None:
    """What works in place later, in the model or outside, does not change what was read."""
    model, recorder = _model(), _Recorder()
    hidden = model.get_submodule("hidden")(_inputs()).detach()
    expected = model(_inputs()).detach()
    attached = tap.attach(model, _READS, recorder)
    output = _drive(attached, model, _inputs())
    output.zero_()
    attached.detach()
    assert recorder.taken, f"nothing was read; failures: {recorder.failed}"
    acts = recorder.taken[0]
    assert torch.equal(acts.layer("hidden"), hidden), "the layer is not what it was in the pass"
    assert torch.equal(acts.require_logits(), expected), "the logits are not what was returned"
    assert not acts.layer("hidden").requires_grad, "activations must be detached"


def check_passes_that_are_not_admitted_are_not_read(tap: Tap) -> None:
    """What the intake passes by never comes to it."""
    model, recorder = _model(), _Recorder(admit=lambda: False)
    attached = tap.attach(model, _READS, recorder)
    _drive(attached, model, _inputs())
    attached.detach()
    assert not recorder.taken, "a pass that was not admitted was handed over"


def check_missing_layers_are_named_when_attached(tap: Tap) -> None:
    """A layer that does not exist is a `ContractError` at attach that names it."""
    model = _model()
    before = _anatomy(model)
    message = ""
    try:
        tap.attach(model, Reads(layers=("hiden",), logits=True), _Recorder())
    except ContractError as error:
        message = str(error)
    else:
        raise AssertionError("attached to a layer that does not exist")
    assert "hiden" in message, f"the message does not name the layer: {message}"
    assert _anatomy(model) == before, "a failed attach left something behind"


def check_threads_do_not_mix(tap: Tap) -> None:
    """Each pass is read whole, whichever threads call the model at once."""
    model, recorder = _model(), _Recorder()
    hidden_layer, inputs = model.get_submodule("hidden"), [_inputs(n) for n in range(_THREADS)]
    with torch.no_grad():
        hidden = [hidden_layer(x) for x in inputs]
        logits = [model(x) for x in inputs]
    attached = tap.attach(model, _READS, recorder)
    if hasattr(attached, "play"):
        attached.detach()
        return
    together = threading.Barrier(_THREADS)
    slow = hidden_layer.register_forward_hook(lambda *_: _give_way())

    def serve(number: int) -> None:
        together.wait()
        with torch.no_grad():
            for _ in range(_PASSES):
                model(inputs[number])

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attached.detach()
    slow.remove()
    assert len(recorder.taken) == _THREADS * _PASSES, (
        f"{_THREADS * _PASSES} passes ran, {len(recorder.taken)} were read"
    )
    for acts in recorder.taken:
        matches = [torch.allclose(acts.require_logits(), each, atol=1e-6) for each in logits]
        assert any(matches), "logits of no pass"
        own = hidden[matches.index(True)]
        assert torch.allclose(acts.layer("hidden"), own, atol=1e-6), "layers of another pass"


def check_a_twin_answers_as_the_model(tap: Tap) -> None:
    """Further passes, where the tap offers them, give what it reads and leave no trace."""
    offered = getattr(tap, "twin", None)
    if offered is None:
        return
    model = _model()
    before = _anatomy(model)
    hidden = model.get_submodule("hidden")(_inputs()).detach()
    expected = model(_inputs()).detach()
    found = offered(model).run(_inputs(), ("hidden",))
    assert torch.allclose(found.require_logits(), expected, atol=1e-6), "the logits are others"
    assert torch.allclose(found.layer("hidden"), hidden, atol=1e-6), "the layer is another"
    assert _anatomy(model) == before, "a further pass changed the model"


def _give_way() -> None:
    """Let another thread run in the middle of the pass."""
    threading.Event().wait(0.0005)


CHECKS: Final = (
    check_detach_restores_the_model,
    check_outputs_are_equal_with_and_without,
    check_nothing_raises_into_the_model,
    check_the_models_own_exception_passes,
    check_values_are_read_as_they_were,
    check_passes_that_are_not_admitted_are_not_read,
    check_missing_layers_are_named_when_attached,
    check_threads_do_not_mix,
    check_a_twin_answers_as_the_model,
)

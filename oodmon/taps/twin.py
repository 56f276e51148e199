"""A private twin of a model: the same weights, modules of its own, for passes that leave no trace.

What detectors are given as `Probe`. The twin is made by copying the modules while every parameter
of the copy is a view of the served one's memory, so it costs the memory of the buffers alone. It
has no hooks, is in evaluation mode for good, collects no gradients, and is made anew when the
served model got other tensors for weights (`.to(device)`, a new layer). Weights that are written in
place are seen at once.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.taps.layout import Place, locate
from oodmon.taps.outputs import find_logits, first_floating, shapes
from oodmon.taps.stacks import Stacks
from oodmon.taps.thinning import Thinning

__all__ = ["Twin"]

_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_WRAPPERS: Final = ("_orig_mod", "module")
"""Where `torch.compile` and data-parallel wrappers keep the model, and prefix its weights with."""

Locate = Callable[[nn.Module, str], Place]


class Twin:
    """Implements `contracts.Probe`.

    Args:
        model: what is served.
        place: finds a layer by the name that a tap gives it; by default names are module paths.
        classes: C where it is known, to tell logits from features in the model's output.
        logits: the layer that gives the logits; "" finds them in the output.
        keep: whether the twin keeps the model alive; else it forgets what is no longer served.

    Passes take turns, so threads may share a twin.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Locate = locate,
        classes: int = 0,
        logits: str = "",
        *,
        keep: bool = True,
    ) -> None:
        inner = _unwrapped(model)
        self._kept = inner if keep else None
        self._model = weakref.ref(inner, lambda _: self._forget())
        self._place = place
        self._classes = classes
        self._logits = logits
        self._turn = threading.RLock()
        self._copy: nn.Module | None = None
        self._pairs: list[_Pair] = []
        self._dtype: torch.dtype | None = None
        self._stacks = Stacks(self._thin)
        self.builds = 0

    def run(
        self,
        inputs: Tensor,
        layers: Sequence[str] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> Activations:
        """One pass without gradient; see `contracts.Probe`."""
        with self._turn, torch.inference_mode(mode=False), torch.no_grad():
            return self._pass(self._own(inputs), layers, weights)

    def slope(
        self,
        inputs: Tensor,
        objective: Callable[[Activations], Tensor],
        layers: Sequence[str] = (),
    ) -> Tensor:
        """Gradient of the objective with respect to the inputs; see `contracts.Probe`."""
        if not inputs.is_floating_point():
            raise ContractError(
                f"inputs: expected a floating tensor to take a gradient of, found {inputs.dtype}"
            )
        with self._turn, torch.inference_mode(mode=False), torch.enable_grad():
            # Not written to by the model: autograd forbids it on what a gradient is taken of.
            leaf = self._own(inputs, copy=inputs.is_inference()).detach().requires_grad_()
            if not len(leaf):
                return leaf.detach()
            found = objective(self._pass(leaf, layers))
            (slope,) = torch.autograd.grad(found.sum(), leaf)
        return slope

    def thinned(
        self, inputs: Tensor, seeds: Sequence[int], rate: float = 0.0
    ) -> Iterator[Activations]:
        """Passes of thinned networks; see `contracts.Probe`."""
        left = list(seeds)
        while left:
            with self._turn:
                self._fresh()
                found = self._stacks.answers(inputs, left, rate)
            if not found:
                thinning = Thinning(left[:1], rate, len(inputs))
                found = (self._thin(inputs, thinning),)
                if not thinning.calls:
                    raise ContractError(
                        "the model runs no dropout in a pass, so there are no networks to thin out"
                    )
            yield from (Activations(logits=logits, inputs=inputs) for logits in found)
            del left[: len(found)]

    def build(self) -> None:
        """Make the copy now, rather than in the first pass; `ContractError` says what prevents it.

        Later passes make it anew where the served model has other tensors by then.
        """
        with self._turn:
            self._fresh()

    def _pass(
        self,
        inputs: Tensor,
        layers: Sequence[str] = (),
        weights: Mapping[str, Tensor] | None = None,
        thinning: Thinning | None = None,
    ) -> Activations:
        model = self._copy
        assert model is not None  # noqa: S101 - `_own` has seen to it
        taken: dict[str, Tensor] = {}
        wanted = dict.fromkeys((*layers, *((self._logits,) if self._logits else ())))
        with _reading(model, {name: self._place(model, name) for name in wanted}, taken):
            try:
                with thinning or nullcontext():
                    output = (
                        model(inputs) if weights is None else _with(model, inputs, dict(weights))
                    )
            except TypeError as error:
                raise ContractError(
                    f"a further pass calls the model with its first tensor alone: {error}"
                ) from error
        missing = [name for name in wanted if name not in taken]
        if missing:
            raise ContractError(f"layer {missing[0]!r} did not run in a further pass")
        logits = taken[self._logits] if self._logits else find_logits(output, self._classes)
        if logits is None:
            raise ContractError(f"logits: expected a floating (B, C), found {shapes(output)}")
        rows = len(inputs) * (thinning.networks if thinning else 1)
        if len(logits) != rows:
            raise ContractError(f"logits: expected {rows} rows, found {len(logits)}")
        return Activations(
            layers={name: taken[name] for name in layers}, logits=logits, inputs=inputs
        )

    def _thin(self, inputs: Tensor, thinning: Thinning) -> Tensor:
        with self._turn, torch.inference_mode(mode=False), torch.no_grad():
            return self._pass(self._own(inputs), thinning=thinning).require_logits()

    def _own(self, inputs: Tensor, *, copy: bool = True) -> Tensor:
        """Inputs that the model may write to, in its own precision; the copy is up to date then."""
        self._fresh()
        dtype = self._dtype if inputs.is_floating_point() else None
        return inputs.detach().to(dtype or inputs.dtype, copy=copy)

    def _fresh(self) -> None:
        """See that the copy is of the model as it is now, buffers and all."""
        model = self._model()
        if model is None:
            raise ContractError("the model is gone")
        tensors = list(_tensors(model))
        known = self._copy is not None and len(tensors) == len(self._pairs)
        if not (known and all(p.fits(t) for p, t in zip(self._pairs, tensors, strict=True))):
            self._copy, self._pairs = _copied(model)
            kinds = (p.dtype for p in self._copy.parameters() if p.is_floating_point())
            self._dtype = next(kinds, None)
            self._stacks = Stacks(self._thin)
            self.builds += 1
        for pair in self._pairs:
            pair.refresh()

    def _forget(self) -> None:
        self._copy, self._pairs = None, []


class _Pair:
    """A tensor of the served model and its like in the copy."""

    def __init__(self, served: Tensor, own: Tensor, *, shared: bool) -> None:
        self._served = weakref.ref(served)
        self._memory = (served.data_ptr(), served.device, served.dtype, served.shape)
        self._own = own
        self._shared = shared
        self._versions = (_version(served), _version(own))

    def fits(self, served: Tensor) -> bool:
        """Whether this is still that tensor, in the same memory."""
        return self._served() is served and self._memory == (
            served.data_ptr(),
            served.device,
            served.dtype,
            served.shape,
        )

    def refresh(self) -> None:
        """A buffer that was written to, in the model or by an earlier pass here, is read again."""
        if self._shared:
            return
        served = self._served()
        if served is None or (_version(served), _version(self._own)) == self._versions:
            return
        self._own.copy_(served)
        self._versions = (_version(served), _version(self._own))


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = inner.module
    if not isinstance(inner, nn.Module):
        raise ContractError(f"a twin needs a torch.nn.Module, found {type(model).__name__}")
    return inner


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of every module, each once."""
    seen: set[int] = set()
    for module in model.modules():
        for held in (*module._parameters.values(), *module._buffers.values()):
            if held is not None and id(held) not in seen:
                seen.add(id(held))
                yield held


def _copied(model: nn.Module) -> tuple[nn.Module, list[_Pair]]:
    """The copy, and which tensor of it stands for which; nothing in it leads back to the model."""
    memo: dict[int, Any] = {}
    parameters = {id(p) for module in model.modules() for p in module._parameters.values()}
    pairs = []
    with torch.inference_mode(mode=False), torch.no_grad():
        for tensor in _tensors(model):
            shared = id(tensor) in parameters and not tensor.is_inference()
            # An inference tensor cannot take part in a gradient, so its value is copied.
            own = tensor.detach() if shared else tensor.detach().clone()
            if id(tensor) in parameters:
                own = nn.Parameter(own, requires_grad=False)
            memo[id(tensor)] = own
            pairs.append(_Pair(tensor, own, shared=shared))
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = value.detach().clone()
            # Hooks lead to whatever their owner wants to know of served passes.
            memo |= {
                id(vars(module)[name]): OrderedDict() for name in _HOOKS if name in vars(module)
            }
        try:
            made = copy.deepcopy(model, memo)
        except Exception as error:
            raise ContractError(
                f"{type(model).__name__} cannot be copied for further passes: "
                f"{type(error).__name__}: {error}"
            ) from error
    served = {id(module) for module in model.modules()}
    for name, module in made.named_modules():
        if id(module) in served:
            raise ContractError(
                f"{type(model).__name__} cannot be copied for further passes: its copy shares the "
                f"module {name or 'itself'!r} with it"
            )
        # Not eval(): what a model's own does besides is done already, or not wanted.
        module.training = False
    return made, pairs


def _version(tensor: Tensor) -> int:
    """Counts writes; inference tensors do not count theirs and are taken for changed."""
    return -1 if tensor.is_inference() else tensor._version


def _with(model: nn.Module, inputs: Tensor, weights: dict[str, Tensor]) -> Any:
    """The model's answer with other weights; nobody else uses this copy meanwhile."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = {_plain(name): tensor for name, tensor in weights.items()}
    needed = model.state_dict().keys()
    odd = sorted(plain.keys() ^ needed)
    if odd:
        kind = "missing" if odd[0] in needed else "unknown"
        raise ContractError(
            f"weights of {type(model).__name__}: {odd[0]!r} is {kind}, and so {len(odd) - 1} others"
        )
    for name, tensor in plain.items():
        if tensor.shape != own[name].shape:
            raise ContractError(
                f"weights of {type(model).__name__}: {name!r}: expected "
                f"{tuple(own[name].shape)}, found {tuple(tensor.shape)}"
            )
    return torch.func.functional_call(model, plain, (inputs,))


def _plain(name: str) -> str:
    """Without the prefixes that compiled and data-parallel models save their weights with."""
    head, dot, rest = name.partition(".")
    return _plain(rest) if dot and head in _WRAPPERS else name


@contextmanager
def _reading(
    model: nn.Module, places: Mapping[str, Place], taken: dict[str, Tensor]
) -> Iterator[None]:
    """What runs inside puts these layers into `taken`."""
    handles = []
    try:
        for name, place in places.items():
            module = model.get_submodule(place.path)
            if place.side == "input":
                handles.append(
                    module.register_forward_pre_hook(_into(taken, name, 1), with_kwargs=True)
                )
            else:
                handles.append(module.register_forward_hook(_into(taken, name, 2)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _into(taken: dict[str, Tensor], name: str, index: int) -> Callable[..., None]:
    def hook(*args: Any) -> None:
        # hooks get (module, arguments, keyword arguments) or (module, arguments, output)
        tensor = first_floating(args[1:] if index == 1 else args[2])
        if tensor is not None:
            # A copy that the gradient flows through: work in place may be next.
            taken[name] = tensor.clone()

    return hook

"""Where a model's head, penultimate features and stages are, found from its modules alone.

No forward pass is run. The names that come out (`head`, `penultimate`, `stage1` …) map to layer
specs: ``path`` or ``path.output`` is what the module at `path` returns, ``path.input`` is its first
argument. A model that really has a child called ``input`` keeps it: an exact path comes first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor, nn

from oodmon.errors import ContractError

__all__ = ["Layout", "Place", "discover", "head_of", "locate"]

Side = Literal["input", "output"]

MOST_STAGES: Final = 5
"""More stages than this are thinned evenly: each costs a copy of its activations."""

MOST_BLOCKS: Final = 4
"""The same for a row of equal blocks, whose neighbours differ little: quarters of the depth."""

_EQUALS: Final = "block of equals"

_TRUNK_SHARE: Final = 0.8
"""A child with this share of the body's parameters is the trunk, and stages are sought inside."""

_HEAD_WORDS: Final = frozenset(
    (
        *("classifier", "classification_head", "fc", "head", "heads"),
        *("last_linear", "linear", "logits", "out", "output", "score"),
    )
)
_NUMBERED_STAGE: Final = re.compile(r"(layer|stage|block|level|group|conv\d*_)s?_?\d+(_x)?$")

_POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLLOWERS: Final = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.PReLU,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A module and the side of it that is read."""

    path: str
    side: Side

    def __str__(self) -> str:
        return f"{self.path}.input" if self.side == "input" else self.path


@dataclass(frozen=True, slots=True)
class Layout:
    """What `discover` found.

    Attributes:
        names: `penultimate`, `stage1` … → layer spec.
        head: path of the last linear map, "" where none was found.
        classes: C, the head's outputs; 0 where no head was found.
        lines: the same for people, one sentence each.
    """

    names: Mapping[str, str]
    head: str
    classes: int
    lines: tuple[str, ...]


def locate(model: nn.Module, spec: str, known: Collection[str] = ()) -> Place:
    """The module that a layer spec names; `ContractError` suggests near names, also of `known`."""
    modules = dict(model.named_modules())
    if spec in modules and spec:
        return Place(spec, "output")
    path, _, side = spec.rpartition(".")
    if path in modules and path:
        if side == "input":
            return Place(path, "input")
        if side == "output":
            return Place(path, "output")
    names = [*known, *(name for name in modules if name)]
    near = difflib.get_close_matches(spec, names, n=3, cutoff=0.5)
    hint = f"; near names: {', '.join(near)}" if near else ""
    named = f"; named layers: {', '.join(known)}" if known else ""
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    raise ContractError(
        f"layer {spec!r}: expected the path of a module of {type(model).__name__}, or one followed "
        f"by `.input`; found no such module{hint}{named}; its children: {children}"
    )


def head_of(model: nn.Module, layout: Layout | None = None) -> tuple[Tensor, Tensor] | None:
    """Weight (C, D) and bias (C,) of the classifier head, detached; none where there is none."""
    layout = layout or discover(model)
    if not layout.head:
        return None
    head = model.get_submodule(layout.head)
    weight = head.weight
    if not isinstance(weight, Tensor):
        return None
    weight = weight.detach().flatten(1)
    bias = head.bias.detach() if isinstance(head.bias, Tensor) else weight.new_zeros(len(weight))
    return weight, bias


def discover(model: nn.Module) -> Layout:
    """Find head, penultimate features and stage outputs of a classifier.

    Knows numbered stages (ResNet-like), pools and strides in a sequence (VGG-, MobileNet- and
    EfficientNet-like), a row of equal blocks (transformer encoders), and falls back to the
    convolutions and linear maps in the order in which they were registered.
    """
    head = _find_head(model)
    names: dict[str, str] = {}
    lines: list[str] = []
    classes = 0
    if head:
        module = model.get_submodule(head)
        classes = int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))
        names["penultimate"] = f"{head}.input"
        lines.append(f"head: {head} ({type(module).__name__}, {classes} classes)")
        lines.append(f"penultimate: the input of {head}")
    else:
        lines.append("head: none found, so no penultimate features either")
    paths, how = _find_stages(model, _head_family(head))
    for number, path in enumerate(_thin(paths, how), start=1):
        names[f"stage{number}"] = path
        lines.append(f"stage{number}: the output of {path} ({how})")
    if not paths:
        lines.append("stages: none found")
    return Layout(names, head, classes, tuple(lines))


def _find_head(model: nn.Module) -> str:
    """The last linear map, by preference one that lies under a name that heads usually have."""
    linear: list[str] = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and not _inside_attention(model, name)
    ]
    named = [name for name in linear if _HEAD_WORDS & set(name.lower().split("."))]
    if named:
        # The classifier itself comes before auxiliary heads whose names only contain the word.
        return named[-1]
    if linear:
        return linear[-1]
    pointwise: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _CONVS) and set(module.kernel_size) == {1}
    ]
    return pointwise[-1] if pointwise else ""


def _head_family(head: str) -> str:
    """The topmost part of the head's path with a head's name: all of it is beyond the body.

    So ``classifier`` for ``classifier.6``: VGG's has nine tenths of the model's parameters.
    """
    parts = head.split(".")
    for index, part in enumerate(parts):
        if part.lower() in _HEAD_WORDS:
            return ".".join(parts[: index + 1])
    return head


def _inside_attention(model: nn.Module, path: str) -> bool:
    """A projection inside an attention or a transformer layer is never the head."""
    while path:
        path = path.rpartition(".")[0]
        kind = type(model.get_submodule(path)).__name__ if path else ""
        if "Attention" in kind or kind.endswith(("EncoderLayer", "TransformerLayer")):
            return True
    return False


def _find_stages(model: nn.Module, head: str) -> tuple[list[str], str]:
    trunk = _find_trunk(model, head)
    module = model.get_submodule(trunk)
    children = [
        (_join(trunk, name), child)
        for name, child in module.named_children()
        if not _covers(_join(trunk, name), head) and _join(trunk, name) != head
    ]
    numbered = [path for path, _ in children if _NUMBERED_STAGE.match(path.rpartition(".")[2])]
    if len(numbered) > 1:
        return [_runnable(model, path) for path in numbered], "numbered stage"
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        rows = [
            (path, child)
            for path, child in children
            if isinstance(child, nn.Sequential | nn.ModuleList | nn.TransformerEncoder)
        ]
        if len(rows) > 1:
            return [_runnable(model, path) for path, _ in rows], "one of several block groups"
        return _by_weights(model, trunk, head)
    blocks = [(path, child) for path, child in children if any(True for _ in child.parameters())]
    kinds = {type(child) for _, child in blocks}
    if len(kinds) == 1 and not kinds & {nn.Linear, *_CONVS, nn.Sequential} and len(blocks) > 1:
        if _has_fast_path(blocks[0][1]):
            # A hook inside switches these layers to another kernel and so changes the outputs.
            owner = trunk.rpartition(".")[0]
            return ([owner] if owner else []), "whole encoder; its layers keep their fast path"
        return [_runnable(model, path) for path, _ in blocks], _EQUALS
    pools = [path for path, child in children if isinstance(child, _POOLS)]
    if pools:
        return pools, "after pooling"
    strided = [
        index
        for index, (_, child) in enumerate(blocks)
        if any(isinstance(m, _CONVS) and max(m.stride) > 1 for m in child.modules())
    ]
    ends = [index - 1 for index in strided if index > 0]
    if ends:
        last = len(blocks) - 1
        chosen = [blocks[index][0] for index in (*ends, last) if index >= 0]
        return [_runnable(model, path) for path in dict.fromkeys(chosen)], "before a stride"
    return _by_weights(model, trunk, head)


def _find_trunk(model: nn.Module, head: str) -> str:
    """Descend while one child holds nearly all of the body's parameters."""
    trunk = ""
    while True:
        module = model.get_submodule(trunk)
        sizes = {
            _join(trunk, name): _body_size(model, _join(trunk, name), head)
            for name, child in module.named_children()
            if any(True for _ in child.children())
        }
        total = _body_size(model, trunk, head)
        best = max(sizes, key=lambda path: sizes[path], default="")
        if not best or total == 0 or sizes[best] < _TRUNK_SHARE * total:
            return trunk
        numbered = [n for n, _ in module.named_children() if _NUMBERED_STAGE.match(n)]
        if len(numbered) > 1 or _is_dense_end(module, model.get_submodule(best)):
            return trunk
        trunk = best


def _is_dense_end(module: nn.Module, heaviest: nn.Module) -> bool:
    """Whether it is linear maps behind convolutions: most of a small CNN's parameters, no map.

    A transformer's blocks, behind the convolution that makes its patches, are modules of their own.
    """
    plain = all(
        isinstance(inner, nn.Sequential) or not any(True for _ in inner.children())
        for inner in heaviest.modules()
    )
    return plain and _convolves(module) and not _convolves(heaviest)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(inner, _CONVS) for inner in module.modules())


def _body_size(model: nn.Module, path: str, head: str) -> int:
    """Parameters below a path, less those of the head."""
    size = sum(p.numel() for p in model.get_submodule(path).parameters())
    if head and (path == head or _covers(path, head)):
        size -= sum(p.numel() for p in model.get_submodule(head).parameters())
    return size


def _by_weights(model: nn.Module, trunk: str, head: str) -> tuple[list[str], str]:
    """The weighted modules in order of registration, each with what directly follows it."""
    paths: list[str] = []
    for path, module in _leaves(model, trunk):
        if path == head or (head and _covers(head, path)) or _inside_attention(model, path):
            continue
        if isinstance(module, (nn.Linear, *_CONVS)):
            paths.append(path)
        elif paths and isinstance(module, _FOLLOWERS) and _adjacent(model, paths[-1], path):
            paths[-1] = path
    return paths, "output of a weighted layer"


def _leaves(model: nn.Module, trunk: str) -> Iterator[tuple[str, nn.Module]]:
    root = model.get_submodule(trunk)
    for name, module in root.named_modules():
        if name and not any(True for _ in module.children()):
            yield _join(trunk, name), module


def _adjacent(model: nn.Module, before: str, after: str) -> bool:
    """Whether two modules run one after the other for certain: neighbours in one Sequential."""
    parent, _, first = before.rpartition(".")
    other, _, second = after.rpartition(".")
    if parent != other or not isinstance(model.get_submodule(parent), nn.Sequential):
        return False
    return first.isdigit() and second.isdigit() and int(second) == int(first) + 1


def _runnable(model: nn.Module, path: str) -> str:
    """A ModuleList is never called itself: its last member is what ends the stage."""
    while isinstance(members := model.get_submodule(path), nn.ModuleList) and len(members):
        path = f"{path}.{len(members) - 1}"
    return path


def _has_fast_path(module: nn.Module) -> bool:
    return any(isinstance(m, nn.TransformerEncoderLayer) for m in module.modules())


def _covers(path: str, inner: str) -> bool:
    """Whether `inner` lies below `path`; the model itself, "", covers everything but itself."""
    return bool(inner) and (not path or inner.startswith(f"{path}."))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _thin(paths: list[str], how: str) -> list[str]:
    """A few of them, evenly, the last one always."""
    count = len(paths)
    most = MOST_BLOCKS if how == _EQUALS else MOST_STAGES
    if count <= most:
        return paths
    return [paths[(count * (index + 1)) // most - 1] for index in range(most)]

"""Streams of scores with a known law, and the changes that happen to them. numpy only.

Every contender sees the same values: the generator is seeded by stream, change and repetition.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["QUIET", "SYNTHETIC", "Change", "Pools", "Stream", "pooled"]

F8 = npt.NDArray[np.float64]
Pools = Mapping[str, F8]

QUIET = 1_000
"""Values before a change."""


@dataclass(frozen=True)
class Change:
    """What happens to the values z = N(0, 1): shifted, scaled, some replaced.

    Attributes:
        name: as printed.
        mean, scale: z becomes mean + scale z.
        share: of the values, which are drawn from the novel law instead.
        novel: pool of the novel law; "" is N(3, 1).
    """

    name: str
    mean: float = 0.0
    scale: float = 1.0
    share: float = 0.0
    novel: str = ""


@dataclass(frozen=True)
class Stream:
    """A law of scores.

    Attributes:
        name: as printed.
        phi: lag-one correlation of the normal values below.
        heavy: whether the scores are exp(z), log-normal.
        pool: scores are drawn from the law of this pool; "" makes Gaussian ones.
        changes: what to try on it.
    """

    name: str
    phi: float = 0.0
    heavy: bool = False
    pool: str = ""
    changes: tuple[Change, ...] = ()

    def generator(self, change: str, repetition: int) -> np.random.Generator:
        """The same for every contender."""
        return np.random.default_rng([zlib.crc32(f"{self.name}/{change}".encode()), repetition])

    def reference(self, repetition: int, size: int, pools: Pools) -> F8:
        """A data set from the law: independent samples, as `oodmon fit` calibrates with them.

        All changes of a stream share the references, so that a slow set-up is done once.
        """
        rng = self.generator("reference", repetition)
        if self.pool:
            return _like(rng, pools[self.pool], size)
        values = rng.standard_normal(size)
        return np.exp(values) if self.heavy else values

    def draw(
        self, rng: np.random.Generator, quiet: int, after: int, change: Change, pools: Pools
    ) -> F8:
        """`quiet` values of the reference's law, then `after` changed ones."""
        size = quiet + after
        changed = np.arange(size) >= quiet
        if self.pool:
            values = _like(rng, pools[self.pool], size)
        else:
            values = autoregressive(rng, size, self.phi)
            values = np.where(changed, change.mean + change.scale * values, values)
        if change.share:
            novel = (
                _like(rng, pools[change.novel], size)
                if change.novel
                else 3.0 + rng.standard_normal(size)
            )
            values = np.where(changed & (rng.random(size) < change.share), novel, values)
        return np.exp(values) if self.heavy else values


def _like(rng: np.random.Generator, pool: F8, size: int) -> F8:
    """Independent values of the pool's law, uniform between its values, which are in order.

    Drawn from the pool itself, the stream would repeat samples of the reference to the last bit.
    """
    return np.interp(rng.random(size) * (len(pool) - 1), np.arange(len(pool)), pool)


def autoregressive(rng: np.random.Generator, size: int, phi: float) -> F8:
    """z_t = φ z_{t-1} + sqrt(1 - φ²) e_t, stationary: each value is N(0, 1)."""
    noise = rng.standard_normal(size)
    if not phi:
        return noise
    noise[1:] *= np.sqrt(1.0 - phi**2)
    # Cut into pieces, so that powers of φ stay in range: z = φ^t cumsum(e φ^-t).
    values = np.empty(size)
    piece = max(int(-200.0 / np.log(phi)), 1)
    last = 0.0
    for begin in range(0, size, piece):
        part = noise[begin : begin + piece].copy()
        part[0] += phi * last
        powers = phi ** np.arange(len(part))
        values[begin : begin + len(part)] = powers * np.cumsum(part / powers)
        last = float(values[begin + len(part) - 1])
    return values


_CHANGES = (
    Change("mean +0.5 sd", mean=0.5),
    Change("mean +1 sd", mean=1.0),
    Change("spread x1.25", scale=1.25),
    Change("5 % novel", share=0.05),
)

SYNTHETIC = (
    Stream("gauss", changes=_CHANGES),
    Stream("gauss, AR 0.3", phi=0.3, changes=_CHANGES),
    Stream("gauss, AR 0.6", phi=0.6, changes=_CHANGES),
    Stream("log-normal", heavy=True, changes=_CHANGES),
)


def pooled(pools: Pools, shares: Sequence[float]) -> tuple[Stream, ...]:
    """One stream per real model in the pools (`<model>/id`), its novel data at these shares."""
    made = []
    for known in sorted(name for name in pools if name.endswith("/id")):
        model = known.removesuffix("/id")
        novel = sorted(n for n in pools if n.startswith(f"{model}/") and n != known)
        changes = tuple(
            Change(f"{share:.0%} {name.removeprefix(f'{model}/')}", share=share, novel=name)
            for name in novel
            for share in shares
        )
        made.append(Stream(model, pool=known, changes=changes))
    return tuple(made)


def load(path: str) -> Pools:
    """Pools from an npz file; none for an empty path."""
    if not path:
        return {}
    with np.load(Path(path)) as file:
        found: dict[str, Any] = {name.replace("|", "/"): file[name] for name in file.files}
    return found

"""The public detectors as contenders, with their own defaults unless the name says otherwise.

Each function builds what one package offers, and imports it only then: the packages live in
environments of their own, since their demands on numpy differ from ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.drift.contender import F8, Contender, OneByOne, Tumbling

__all__ = ["ALIBI", "BENCH", "MAIN"]

LEVEL = 0.05
"""Share of reference scores that count as an exceedance, for detectors of error rates."""

Build = Callable[[], Contender]


def _river(name: str, **options: Any) -> Build:
    """A detector of `river.drift`, warmed up on the reference."""

    def build(reference: F8) -> Any:
        import river.drift

        detector = getattr(river.drift, name)(**options)
        for value in reference.tolist():
            detector.update(value)
        return detector

    return lambda: OneByOne(build, _river_step)


def _river_step(detector: Any, value: float) -> bool:
    detector.update(value)
    return bool(detector.drift_detected)


def _river_binary(name: str) -> Build:
    """A detector of error rates on exceedances of the reference's upper `LEVEL` quantile."""

    def build(reference: F8) -> tuple[Any, float]:
        import river.drift.binary

        detector = getattr(river.drift.binary, name)()
        cut = float(np.quantile(reference, 1.0 - LEVEL))
        for value in reference.tolist():
            detector.update(value > cut)
        return detector, cut

    def step(made: tuple[Any, float], value: float) -> bool:
        detector, cut = made
        detector.update(value > cut)
        return bool(detector.drift_detected)

    return lambda: OneByOne(build, step)


def _frouros(name: str, **options: Any) -> Build:
    """A detector of `frouros.detectors.concept_drift`, warmed up on the reference."""
    # It calls its input an error rate; its ADWIN accepts no negative one.
    lift = 10.0 if name == "ADWIN" else 0.0

    def build(reference: F8) -> Any:
        frouros = importlib.import_module("frouros.detectors.concept_drift")
        config = getattr(frouros, f"{name}Config")(**options)
        detector = getattr(frouros, name)(config=config)
        for value in reference.tolist():
            detector.update(value=value + lift)
            if detector.drift:
                detector.reset()  # it does not go on by itself, as the others do
        return detector

    def step(detector: Any, value: float) -> bool:
        detector.update(value=value + lift)
        return bool(detector.drift)

    return lambda: OneByOne(build, step)


def _frouros_ks(window: int, alpha: float) -> Build:
    def build(reference: F8) -> Any:
        frouros = importlib.import_module("frouros.detectors.data_drift")
        detector = frouros.IncrementalKSTest(window_size=window)
        detector.fit(X=reference)
        return detector

    def step(detector: Any, value: float) -> bool:
        result, _ = detector.update(value=value)
        return result is not None and float(result.p_value) <= alpha

    return lambda: OneByOne(build, step)


def _menelaus(name: str) -> Build:
    def build(reference: F8) -> Any:
        menelaus = importlib.import_module("menelaus.change_detection")
        detector = getattr(menelaus, name)()
        for value in reference.tolist():
            detector.update(value)
        return detector

    def step(detector: Any, value: float) -> bool:
        detector.update(value)
        return bool(detector.drift_state == "drift")

    return lambda: OneByOne(build, step)


def _nonconform(name: str, threshold: float) -> Build:
    """A martingale of `nonconform` on smoothed split-conformal p-values, Shiryaev–Roberts alarm."""

    def build(reference: F8) -> tuple[Any, F8, np.random.Generator]:
        martingales = _nonconform_module()
        config = martingales.AlarmConfig(shiryaev_roberts_threshold=threshold)
        detector = getattr(martingales, name)(alarm_config=config)
        return detector, np.sort(reference), np.random.default_rng(0)

    def step(made: tuple[Any, F8, np.random.Generator], value: float) -> bool:
        detector, ordered, rng = made
        low = len(ordered) - int(np.searchsorted(ordered, value, side="right"))
        high = len(ordered) - int(np.searchsorted(ordered, value, side="left"))
        p = (low + rng.random() * (high - low + 1)) / (len(ordered) + 1)
        return bool(detector.update(p).triggered_alarms)

    return lambda: OneByOne(build, step)


def _nonconform_module() -> Any:
    """The package needs Python 3.12 as a whole; its martingales stand alone and do not."""
    if "nonconform_martingales" in sys.modules:
        return sys.modules["nonconform_martingales"]
    package = importlib.util.find_spec("nonconform")
    if package is None or not package.submodule_search_locations:
        raise ImportError("nonconform is not installed")
    path = f"{package.submodule_search_locations[0]}/martingales.py"
    spec = importlib.util.spec_from_file_location("nonconform_martingales", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nonconform_martingales"] = module
    spec.loader.exec_module(module)
    return module


def _alibi(name: str, run_time: int) -> Build:
    def build(reference: F8) -> Any:
        cd = importlib.import_module("alibi_detect.cd")

        column = reference.astype(np.float32)[:, None][:500]
        if name == "CVMDriftOnline":
            return cd.CVMDriftOnline(
                column, ert=run_time, window_sizes=[20, 100], n_bootstraps=5_000, verbose=False
            )
        return getattr(cd, name)(
            column,
            ert=run_time,
            window_size=40,
            backend="pytorch",
            n_bootstraps=2_000,
            verbose=False,
        )

    def step(detector: Any, value: float) -> bool:
        found = detector.predict(np.array([value], np.float32))
        return bool(found["data"]["is_drift"])

    return lambda: OneByOne(build, step)


def _ks(alpha: float) -> Callable[[F8, F8], bool]:
    from scipy.stats import ks_2samp

    return lambda known, seen: bool(ks_2samp(known, seen, method="asymp").pvalue < alpha)


def _wasserstein(known: F8, seen: F8) -> bool:
    from scipy.stats import wasserstein_distance

    return bool(wasserstein_distance(known, seen) / known.std() >= 0.1)


def _psi(known: F8, seen: F8) -> bool:
    edges = known[(len(known) * np.arange(1, 10)) // 10]
    a = np.bincount(np.searchsorted(edges, seen), minlength=10) / len(seen)
    b = np.bincount(np.searchsorted(edges, known), minlength=10) / len(known)
    a, b = np.maximum(a, 1e-4), np.maximum(b, 1e-4)
    return bool(((a - b) * np.log(a / b)).sum() >= 0.2)


MAIN: dict[str, Build] = {
    "river ADWIN": _river("ADWIN"),
    "river PageHinkley": _river("PageHinkley"),
    "river KSWIN": _river("KSWIN", seed=0),
    "river HDDM_A on exceedances": _river_binary("HDDMA"),
    "river HDDM_W on exceedances": _river_binary("HDDMW"),
    "river DDM on exceedances": _river_binary("DDM"),
    "scipy KS p<0.05, 100": lambda: Tumbling(100, _ks(0.05)),
    "scipy KS p<0.05, 500": lambda: Tumbling(500, _ks(0.05)),
    "scipy Wasserstein 0.1 sd, 100": lambda: Tumbling(100, _wasserstein),
    "scipy Wasserstein 0.1 sd, 500": lambda: Tumbling(500, _wasserstein),
    "PSI 0.2, 100": lambda: Tumbling(100, _psi),
    "PSI 0.2, 500": lambda: Tumbling(500, _psi),
}
"""In the project's own environment."""

BENCH: dict[str, Build] = {
    "frouros PageHinkley": _frouros("PageHinkley"),
    "frouros CUSUM": _frouros("CUSUM"),
    "frouros ADWIN": _frouros("ADWIN"),
    "frouros KSWIN": _frouros("KSWIN", seed=0),
    "frouros GMA": _frouros("GeometricMovingAverage"),
    "frouros incremental KS, 100": _frouros_ks(100, 0.001),
    "menelaus ADWIN": _menelaus("ADWIN"),
    "menelaus PageHinkley": _menelaus("PageHinkley"),
    "menelaus CUSUM": _menelaus("CUSUM"),
    "nonconform power, SR 10,000": _nonconform("PowerMartingale", 10_000.0),
    "nonconform mixture, SR 10,000": _nonconform("SimpleMixtureMartingale", 10_000.0),
    "nonconform jumper, SR 10,000": _nonconform("SimpleJumperMartingale", 10_000.0),
}
"""In an environment with the dependency group `bench`."""

ALIBI: dict[str, Build] = {
    "alibi-detect MMD online 1,000": _alibi("MMDDriftOnline", 1_000),
    "alibi-detect CvM online 1,000": _alibi("CVMDriftOnline", 1_000),
}
"""In an environment with alibi-detect."""

"""What every detector has to hold to: rows alone, higher is more OOD, nothing kept, no waiting.

The data is made by `samples`; every check takes a detector whose layers are named.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from oodmon.checks import examples_of
from oodmon.checks.detectors.learning import (
    check_foreign_state_is_refused,
    check_same_reference_same_state,
    check_save_and_load,
)
from oodmon.checks.detectors.model import members
from oodmon.checks.detectors.probing import (
    check_no_global_generator_is_touched,
    check_the_model_is_left_alone,
)
from oodmon.checks.detectors.samples import (
    LAYERS,
    channels_last,
    close,
    each,
    extremes,
    joined,
    learnt,
    rows,
    samples,
    strided,
    tensors,
)
from oodmon.checks.detectors.telling import (
    check_cost_and_paper_are_told,
    check_docstring_block,
    check_what_is_missing_is_named,
)
from oodmon.contracts import Detector
from oodmon.errors import OodmonError
from oodmon.evaluate import auroc

__all__ = ["CHECKS", "cases"]

_SEPARATED: Final = 0.95  # AUROC that any detector reaches on blobs this far apart
_DRAWS: Final = 30  # batches after which nothing may have been kept


def cases(cls: type[Detector]) -> list[Detector]:
    """Instances with the options of `cls.examples()`; open layers are chosen from the data's.

    An option `weights_folder` is filled with a folder of weights for the model of the checks.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    more = {"weights_folder": members()} if "weights_folder" in fields else {}
    return [cls(**{**more, **chosen}).pin(LAYERS) for chosen in examples_of(cls)]


def check_scores_are_a_finite_column(detector: Detector) -> None:
    """(B,), floating, and finite for zeros, huge activations and saturated logits."""
    scorer = learnt(detector)
    acts = joined(samples(detector, 16), extremes(detector))
    scores = detector.score(acts, scorer.state)
    assert tuple(scores.shape) == (acts.rows,), (
        f"expected shape ({acts.rows},), found {tuple(scores.shape)}"
    )
    assert scores.is_floating_point(), f"expected floating scores, found {scores.dtype}"
    wrong = (~scorer.score(acts).isfinite()).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong} of finite activations have scores {scores[wrong].tolist()}"


def check_rows_are_independent(detector: Detector) -> None:
    """A row scores the same alone, in a batch, and beside other rows."""
    scorer, acts = learnt(detector), samples(detector, 24)
    together = scorer.score(acts)
    alone = torch.cat([scorer.score(rows(acts, slice(i, i + 1))) for i in range(acts.rows)])
    close(alone, together, "one by one, and in a batch of 24")
    beside = scorer.score(joined(rows(acts, slice(0, 12)), samples(detector, 30, strange=True)))
    close(beside[:12], together[:12], "beside strange rows, and beside others")


def check_permuting_rows_permutes_scores(detector: Detector) -> None:
    """The place of a row in its batch does not matter."""
    scorer, acts = learnt(detector), samples(detector, 24)
    order = torch.randperm(acts.rows, generator=torch.Generator().manual_seed(1))
    close(scorer.score(rows(acts, order)), scorer.score(acts)[order], "permuted, and not")


def check_empty_batch(detector: Detector) -> None:
    """No rows, no scores."""
    try:
        found = learnt(detector).score(rows(samples(detector, 4), slice(0, 0)))
    except (OodmonError, RuntimeError, IndexError) as error:
        raise AssertionError(f"no rows cannot be scored: {error}") from error
    assert tuple(found.shape) == (0,), f"expected (0,) for no rows, found {tuple(found.shape)}"


def check_inputs_and_state_are_unchanged(detector: Detector) -> None:
    """Scoring writes neither to what was tapped nor to what was learnt."""
    scorer, acts = learnt(detector), samples(detector, 24)
    watched = {**tensors(acts), **{f"state {name}": t for name, t in scorer.state.items()}}
    before = {name: tensor.clone() for name, tensor in watched.items()}
    scorer.score(acts)
    for name, tensor in watched.items():
        assert torch.equal(tensor, before[name]), f"scoring changed {name}"


def check_nan_stays_in_its_row(detector: Detector) -> None:
    """A NaN in one row leaves the other rows' scores alone, and does not look like a score."""
    scorer, acts = learnt(detector), samples(detector, 12)
    whole = scorer.score(acts)
    spoilt = each(acts, Tensor.clone)
    for tensor in tensors(spoilt).values():
        tensor[3] = math.nan
    found = scorer.score(spoilt)
    kept = torch.arange(acts.rows) != 3
    close(found[kept], whole[kept], "beside a row of NaN, and without")
    assert found[3].isnan(), f"a row of NaN was scored {float(found[3])}"


def check_half_precision(detector: Detector) -> None:
    """Half and bfloat16 activations score as the same values in float32 do, without overflow."""
    scorer = learnt(detector)
    for dtype in (torch.float16, torch.bfloat16):
        acts = each(
            joined(samples(detector, 24), samples(detector, 8, strange=True)),
            lambda tensor, dtype=dtype: tensor.to(dtype),  # type: ignore[misc]
        )
        whole = scorer.score(each(acts, Tensor.float))
        close(scorer.score(acts), whole, f"in {dtype}, and the same values in float32")


def check_no_gradient(detector: Detector) -> None:
    """Works in inference mode, and leaves no gradient behind."""
    scorer, acts = learnt(detector), each(samples(detector, 8), _with_gradient)
    try:
        found = scorer.score(acts)
    except RuntimeError as error:
        raise AssertionError(f"scoring does not work in inference mode: {error}") from error
    assert not found.requires_grad, "the scores require a gradient"
    for name, tensor in tensors(acts).items():
        assert tensor.grad is None, f"scoring computed a gradient of {name}"


def check_higher_is_more_ood(detector: Detector) -> None:
    """Samples far from all classes, of which the model is unsure, score above the reference's."""
    scorer = learnt(detector)
    inside = scorer.score(samples(detector, 200, seed=5)).numpy()
    outside = scorer.score(samples(detector, 200, strange=True, seed=6)).numpy()
    found = auroc(inside, outside)
    assert found >= _SEPARATED, (
        f"AUROC {found:.3f} on separable blobs, at least {_SEPARATED} expected"
        + (" (the sign is wrong)" if found < 0.5 else "")
    )


def check_same_answer_twice(detector: Detector) -> None:
    """Scoring has no memory and no dice."""
    scorer, acts = learnt(detector), samples(detector, 24)
    first = scorer.score(each(acts, Tensor.clone))
    scorer.score(samples(detector, 8, strange=True))
    again = scorer.score(each(acts, Tensor.clone))
    assert torch.equal(first, again), "the same batch was scored differently the second time"


def check_threads_do_not_mix(detector: Detector) -> None:
    """One scorer in two threads gives each thread its own batch's scores."""
    scorer = learnt(detector)
    batches = [samples(detector, 16, seed=seed) for seed in range(20)]
    alone = [scorer.score(each(acts, Tensor.clone)) for acts in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(scorer.score, batches))
    for number, (one, other) in enumerate(zip(alone, found, strict=True)):
        close(other, one, f"batch {number} in two threads, and alone")


def check_any_memory_layout(detector: Detector) -> None:
    """Strided, expanded and channels-last tensors score as contiguous ones do."""
    scorer, acts = learnt(detector), samples(detector, 24)
    whole = scorer.score(acts)
    close(scorer.score(each(acts, strided)), whole, "strided, and contiguous")
    close(scorer.score(each(acts, channels_last)), whole, "channels-last, and contiguous")


def check_nothing_is_kept(detector: Detector) -> None:
    """Memory is bounded: no batch outlives its scoring, and options stay as they were."""
    scorer, before = learnt(detector), repr(detector)
    seen: list[weakref.ref[Tensor]] = []
    for number in range(_DRAWS):
        acts = samples(detector, 4, seed=number)
        seen += [weakref.ref(tensor) for tensor in tensors(acts).values()]
        scorer.score(acts)
    del acts
    alive = sum(reference() is not None for reference in seen)
    assert not alive, f"{alive} tensors of {_DRAWS} scored batches are still held"
    assert repr(detector) == before, "scoring changed the options"


def check_nothing_waits_for_the_device(detector: Detector) -> None:
    """No value is brought to the host: scoring works on tensors that have shapes and no values.

    On a machine with CUDA it also runs there, with synchronisation made an error.
    """
    scorer, acts = learnt(detector), samples(detector, 8)
    try:
        found = scorer.to("meta").score(each(acts, lambda tensor: tensor.to("meta")))
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(f"scoring needs a value on the host: {error}") from error
    assert found.device.type == "meta", f"the scores left the device for {found.device}"
    if torch.cuda.is_available():
        on_device = each(acts, Tensor.cuda)
        moved = scorer.to("cuda")
        moved.score(each(acts, Tensor.cuda))  # the first call may set up libraries
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            there = moved.score(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(there.cpu(), scorer.score(acts), "on CUDA, and on the CPU", tolerance=1e-2)


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


CHECKS: Final[tuple[Callable[[Detector], None], ...]] = (
    check_scores_are_a_finite_column,
    check_rows_are_independent,
    check_permuting_rows_permutes_scores,
    check_empty_batch,
    check_inputs_and_state_are_unchanged,
    check_nan_stays_in_its_row,
    check_half_precision,
    check_no_gradient,
    check_higher_is_more_ood,
    check_same_reference_same_state,
    check_same_answer_twice,
    check_threads_do_not_mix,
    check_save_and_load,
    check_any_memory_layout,
    check_what_is_missing_is_named,
    check_foreign_state_is_refused,
    check_docstring_block,
    check_cost_and_paper_are_told,
    check_nothing_is_kept,
    check_nothing_waits_for_the_device,
    check_the_model_is_left_alone,
    check_no_global_generator_is_touched,
)

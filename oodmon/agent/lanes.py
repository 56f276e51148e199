"""How scoring keeps out of the way of serving: a quiet thread on the CPU, a side stream on CUDA."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oodmon.agent.passes import Pass

__all__ = ["CpuLane", "CudaLane", "Lane", "Measured", "lane_for", "mark", "quiet_thread"]

log = logging.getLogger(__name__)

Compute = Callable[[], tuple[Tensor, Tensor | None]]
"""Makes scores (K, B) float32 and predicted classes (B,) int32, or none, on the lane's device."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Scores on the host, and the device's own account of the time."""

    scores: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int32]
    device_seconds: float
    """Device time of scoring; 0 on the CPU, where the thread's own clock has it."""
    serving_seconds: float
    """Device time of the passes; 0 on the CPU, where they were timed in their threads."""


class Lane(Protocol):
    """Where scoring runs."""

    def run(self, passes: Sequence[Pass], compute: Compute) -> Measured:
        """Compute once the passes' activations are there, and bring the scores to the host."""

    def aside(self, passes: Sequence[Pass]) -> AbstractContextManager[object]:
        """Work inside sees the device as these passes left it, and holds up nothing served."""


class CpuLane:
    """In the scoring thread itself."""

    def run(self, passes: Sequence[Pass], compute: Compute) -> Measured:
        """Nothing to wait for."""
        del passes
        scores, predicted = compute()
        return Measured(scores.numpy(), _host(predicted), 0.0, 0.0)

    def aside(self, passes: Sequence[Pass]) -> AbstractContextManager[object]:
        """Nothing to wait for."""
        del passes
        return nullcontext()


class CudaLane:
    """On a stream of its own, behind the events that the serving stream recorded.

    Only the scores travel to the host, through pinned memory. The scoring thread sleeps until they
    are there (a blocking event does not spin); the serving thread never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, passes: Sequence[Pass], compute: Compute) -> Measured:
        """Wait for the passes on the device, score, copy, wait for the copy in this thread."""
        stream = self._stream
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            done = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            self._await(passes)
            for item in passes:
                for tensor in item.tensors():
                    # Allocated on the serving stream: not to be reused before this one is past it.
                    if tensor.is_cuda:
                        tensor.record_stream(stream)
            begin.record(stream)
            scores, predicted = compute()
            host_scores = _pinned(scores)
            host_predicted = None if predicted is None else _pinned(predicted)
            done.record(stream)
        done.synchronize()
        serving = sum(
            item.started.elapsed_time(item.ended)
            for item in passes
            if item.started is not None and item.ended is not None
        )
        return Measured(
            # Copies: pinned memory goes back to its pool.
            host_scores.numpy().copy(),
            _host(host_predicted).copy(),
            begin.elapsed_time(done) / 1000.0,
            serving / 1000.0,
        )

    def aside(self, passes: Sequence[Pass]) -> AbstractContextManager[object]:
        """On the scoring stream, behind the passes."""
        self._await(passes)
        return torch.cuda.stream(self._stream)

    def _await(self, passes: Sequence[Pass]) -> None:
        for item in passes:
            if item.ended is not None:
                self._stream.wait_event(item.ended)


def lane_for(device: torch.device) -> Lane:
    """The lane of a device."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()


def mark(device: torch.device) -> Any:
    """An event on the device's current stream: recorded in the serving thread, waited for never.

    None on the CPU.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def quiet_thread(nice: int) -> None:
    """Make the calling thread give way: a higher nice value and no thread pool of its own.

    `torch.set_num_threads` would not do: it also sets what threads started later get, and what MKL
    uses everywhere, so a scoring thread that calls it slows down the serving threads.
    """
    if nice > 0 and hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        except OSError as error:
            log.debug("the scoring thread keeps its priority: %s", error)
    torch.get_num_threads()  # let torch set this thread up first; it would undo what follows
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.debug("the scoring thread keeps torch's thread pool: %s", error)
        return
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        function = getattr(library, name, None)
        if function is not None:
            function(ctypes.c_int(1))


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def _host(predicted: Tensor | None) -> npt.NDArray[np.int32]:
    if predicted is None:
        return np.empty(0, np.int32)
    array: npt.NDArray[np.int32] = predicted.numpy()
    return array

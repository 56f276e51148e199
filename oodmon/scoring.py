"""The process beside the daemon that scores logits: the daemon itself never imports torch.

``python -m oodmon.scoring FOLDER [DETECTOR…]`` speaks frames on its standard input and output: four
bytes of length, then arrays and texts as `oodmon.wire.pack` writes them. It begins by telling which
detectors it has; then each frame of logits is answered by one of scores. It ends with its input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from oodmon.errors import OodmonError, StateError
from oodmon.wire import pack, unpack

__all__ = ["MAX_FRAME_BYTES", "main", "read_frame", "write_frame"]

MAX_FRAME_BYTES: Final = 1 << 28
_CALIBRATION: Final = ".calibration.safetensors"
_STATE: Final = ".safetensors"


def read_frame(source: BinaryIO) -> bytes:
    """The next frame; empty at the end. `OodmonError` where it is longer than any of ours."""
    head = source.read(4)
    if len(head) < 4:
        return b""
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME_BYTES:
        raise StateError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return source.read(length)


def write_frame(
    target: BinaryIO, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, str]
) -> None:
    """Write one frame."""
    data = pack(arrays, meta)
    target.write(len(data).to_bytes(4, "little") + data)
    target.flush()


def main(arguments: Sequence[str]) -> int:
    """Score until the input ends: the exit status."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the frames
    folder, wanted = Path(arguments[0]), arguments[1:]
    names = wanted or sorted(
        path.name.removesuffix(_STATE)
        for path in folder.glob(f"*{_STATE}")
        if not path.name.endswith(_CALIBRATION)
    )
    if not names:
        write_frame(out, {}, {})
        return 1
    # Only now: the import takes seconds.
    import torch

    from oodmon.detectors import Scorer
    from oodmon.records import Activations

    torch.set_num_threads(1)
    scorers: dict[str, Scorer] = {}
    try:
        for name in names:
            scorer = Scorer.load(folder / f"{name}{_STATE}")
            reads = scorer.reads()
            if not (reads.layers or reads.inputs):
                scorers[name] = scorer
            elif wanted:
                raise StateError(f"{name} reads more than logits, which is all that is sent here")
    except OodmonError as error:
        write_frame(out, {}, {"error": str(error)})
        return 1
    write_frame(out, {}, {f"digest.{name}": scorer.digest for name, scorer in scorers.items()})
    while data := read_frame(sys.stdin.buffer):
        logits = torch.from_numpy(unpack(data)[0]["logits"])
        acts = Activations(logits=logits)
        scores: dict[str, npt.NDArray[Any]] = {}
        for name, scorer in scorers.items():
            try:
                scores[name] = scorer.score(acts).numpy()
            except Exception as error:
                # As in the agent: a detector that fails is a column of NaN.
                sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
                scores[name] = np.full(len(logits), np.nan, np.float32)
        write_frame(out, scores, {})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Examples whose token ids lie in a file while training runs: of a long document they would take more memory than it does.

A token id takes 4 bytes there and about 36 as a Python number in a tuple, and memory holds those pages only that a step
reads. Knows nothing of training.
"""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from liftlm.examples import Example
from liftlm.storage import write_errors


def keep_on_disk(examples: Iterable[Example], folder: Path | None = None) -> list[Example]:
    """The same examples; their tokens and labels are views of a file without a name, which goes when they go.

    folder: where there is room for it; else the system's folder for temporary files. Raises DiskFullError,
    NoWritePermissionError.
    """
    lengths: list[int] = []
    kept: list[Example] = []
    with write_errors((folder or Path(tempfile.gettempdir())) / "examples"):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for example in examples:
                file.write(array("i", example.tokens).tobytes())
                file.write(array("i", example.labels).tobytes())
                lengths.append(len(example))
                kept.append(replace(example, tokens=(), labels=()))
            file.flush()
            if not sum(lengths):
                return kept
            numbers = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("i")
    place = 0
    for index, length in enumerate(lengths):
        tokens, labels = numbers[place : place + length], numbers[place + length : place + 2 * length]
        kept[index] = replace(kept[index], tokens=tokens, labels=labels)
        place += 2 * length
    return kept

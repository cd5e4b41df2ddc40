"""What `devices` sets for the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liftlm.devices import peak_memory, reset_peak_memory

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize("given", [None, "7"])
def test_few_compiled_products_are_kept_unless_told(given: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != CAPACITY}
    if given is not None:
        environment[CAPACITY] = given
    code = f"import os, liftlm.devices; print(os.environ['{CAPACITY}'])"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == (given or "64")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_the_peak_of_memory_can_be_reset() -> None:
    block = torch.ones(100_000_000)  # 400 MB
    high = peak_memory()
    del block
    reset_peak_memory()
    assert peak_memory() < high - 300_000_000

"""What `devices` sets for the whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liftlm.devices import peak_memory, reset_peak_memory

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of PyTorch's layer above it
# what products of ever other shapes leave behind, in bytes a shape
PRODUCTS = """
import ctypes, liftlm.devices, torch
libc, dtype = ctypes.CDLL(None), torch.bfloat16
Found = type("Found", (ctypes.Structure,), {"_fields_": [(str(n), ctypes.c_size_t) for n in range(10)]})
libc.mallinfo2.restype = Found
torch.set_num_threads(1)
def products(lengths):
    for n in lengths:
        torch.randn(3, n, 64, dtype=dtype) @ torch.randn(3, 64, n, dtype=dtype)
    found = libc.mallinfo2()
    return getattr(found, "7") + getattr(found, "4")  # in use: in the heap, and mapped
before = products(range(300, 400))
print((products(range(400, 500)) - before) / 100)
"""


@pytest.mark.parametrize("given", [None, "7"])
def test_few_compiled_products_are_kept_unless_told(given: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    if given is not None:
        environment |= dict.fromkeys(CAPACITIES, given)
    code = f"import os, liftlm.devices; print(*[os.environ[name] for name in {CAPACITIES}])"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [given or "64"] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc what is in use")
def test_products_of_ever_other_shapes_leave_little_behind() -> None:
    out = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 50_000  # 270,000 with PyTorch's own bound, where there is AVX-512


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_the_peak_of_memory_can_be_reset() -> None:
    block = torch.ones(100_000_000)  # 400 MB
    high = peak_memory()
    del block
    reset_peak_memory()
    assert peak_memory() < high - 300_000_000

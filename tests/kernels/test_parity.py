"""Every kernel's Triton version agrees with its torch reference: natively on a GPU, else under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this system")

_PROGRAM = """
import sys
import torch
from sdkernels import cast, kernel, linear
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert kernel.HAS_TRITON
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

def steps(x):
    bits = x.view(BITS[x.dtype.itemsize]).long()
    return torch.where(bits < 0, -(bits & ~(-1 << (8 * x.dtype.itemsize - 1))), bits)

seen = 0
for one in (linear.combine,):
    for case in one.cases():
        want = one.reference(*case.make(device))
        got = one.fast(*case.make(device))
        assert got.dtype == want.dtype and got.shape == want.shape, case.name
        apart = (steps(got) - steps(want)).abs().max().item()
        allowed = 0 if device.type == "cuda" or want.dtype in (torch.float16, torch.float32) else 1
        assert apart <= allowed, f"{one.name} {case.name}: {apart} steps apart"
        seen += 1
print(seen)
"""


def test_fast_equals_reference() -> None:
    """Bit for bit; one step where the interpreter is known to cut off instead of rounding (bf16 and fp8)."""
    env = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 25

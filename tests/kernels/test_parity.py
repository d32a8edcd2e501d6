"""Every kernel's Triton version agrees with its torch reference: natively on a GPU, else under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import sdkernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this system")

# The interpreter must be asked for before Triton is imported, so all kernels run in one process of their own.
_PROGRAM = """
import json
import sys
import traceback
import torch
import sdkernels
from sdkernels.kernel import HAS_TRITON, defined_in

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert HAS_TRITON
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

def steps(x):
    bits = x.contiguous().view(BITS[x.dtype.itemsize]).long()
    return torch.where(bits < 0, -(bits & ~(-1 << (8 * x.dtype.itemsize - 1))), bits)

def check(one, got, want):
    assert got.dtype == want.dtype, f"{got.dtype} instead of {want.dtype}"
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    got_number, want_number = ~got.double().isnan(), ~want.double().isnan()
    assert torch.equal(got_number, want_number), "NaN in other places"
    got, want = got[got_number], want[want_number]
    if not want.numel():
        return
    if one.tolerance:
        apart = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-300)
        assert apart.item() <= one.tolerance, f"{apart.item():g} of the largest value apart"
    else:
        apart = (steps(got) - steps(want)).abs().max().item()
        cut = device.type == "cpu" and want.dtype not in (torch.float16, torch.float32, torch.float64)
        assert apart <= cut, f"{apart} steps apart"

def run(name):
    seen, failed = 0, []
    for one in defined_in(getattr(sdkernels, name)):
        for case in one.cases():
            seen += 1
            try:
                got, want = one.fast(*case.make(device)), one.reference(*case.make(device))
                pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
                for pair in pairs:
                    check(one, *pair)
            except Exception as error:
                failed.append(f"{one.name}, {case.name}: " + traceback.format_exc(limit=-2))
    return {"seen": seen, "failed": failed}

def safely(name):
    try:
        return run(name)
    except Exception as error:
        return {"seen": 0, "failed": [traceback.format_exc()]}

print(json.dumps({name: safely(name) for name in sys.argv[1:]}))
"""

_MODULES = [name for name in sdkernels.__all__ if name not in ("cast", "kernel")]


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    env = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", _PROGRAM, *_MODULES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", _MODULES)
def test_fast_equals_reference(answers: dict[str, Any], module: str) -> None:
    """Bit for bit, or within a kernel's tolerance; one step where the interpreter cuts off instead of rounding."""
    assert not answers[module]["failed"], "\n".join(answers[module]["failed"])
    assert answers[module]["seen"] >= 5, "a kernel needs cases"

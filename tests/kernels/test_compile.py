"""The kernels over tables and the LoRA layer compile for a GPU, down to its machine code: the interpreter is more lenient.

Triton needs no GPU to compile, only to be told which one; nothing is launched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton for this system")

_PROGRAM = """
import json
import torch
torch.cuda.is_available = lambda: True
torch.version.cuda = "12.8"  # what sdkernels.kernel looks at to decide that Triton runs
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Target:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

triton.runtime.driver.set_active(Target())
run, made = JITFunction.run, []

def compiled(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    text = kernel.asm["ptx"]
    made.append((self.fn.__name__, text.count("wgmma"), text.count("ld.global.b16"), "cubin" in kernel.asm))
    return kernel

JITFunction.run = compiled
import sdkernels

WANTED = {
    sdkernels.lowrank: ("bf16-turned", "fp16-chance", "bf16-aligned"),
    sdkernels.hadamard: ("bf16-aligned",),
    sdkernels.kron: ("mixed",),
    sdkernels.dora: ("bf16-rows-aligned", "bf16-inputs-aligned"),
    sdkernels.lora_linear: ("bfloat16-65x63-130-rank-4", "float32-17x32-80-rank-64", "bfloat16-640-70x17"),
}
for module, names in WANTED.items():
    for kernel in sdkernels.kernel.defined_in(module):
        for case in kernel.cases():
            if case.name in names:
                kernel.fast(*case.make(torch.device("cpu")))
print(json.dumps(made))
"""


def test_machine_code(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, *_ in made} == {
        "_bake_kernel", "_squares_kernel", "_add_kernel", "_outer_kernel"
    }  # fmt: skip
    assert all(binary for *_, binary in made)
    baked = [(products, single) for name, products, single, _ in made if name == "_bake_kernel"]
    # Aligned bfloat16 factors are multiplied by tensor cores, and no element is loaded alone.
    assert any(products and not single for products, single in baked)

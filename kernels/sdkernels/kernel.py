"""What a kernel is, and the only `import triton`.

A kernel is a torch `reference` that says what is right, a `fast` launcher of a Triton kernel that says it quickly, and
`cases` on which one parity test and one benchmark run both. Triton is loaded only where it can run: with a GPU, or under
``TRITON_INTERPRET=1`` (its interpreter, for tests on a CPU). Elsewhere stand-ins let the kernel files be imported.

Kernel files must not use ``from __future__ import annotations``: the interpreter needs real `tl.constexpr` annotations.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


def _triton_runs() -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return torch.cuda.is_available() and torch.version.cuda is not None


class _NoTriton:
    """Stands in for `triton` and `triton.language`: enough for a kernel file to be imported, nothing to run."""

    constexpr = int

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
        return function if function is not None else lambda decorated: decorated

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length()


HAS_TRITON = False
triton: Any = _NoTriton
tl: Any = _NoTriton
if _triton_runs():
    # Fused multiply-adds only where a kernel asks for one: Triton versions differ in whether they make their own.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    try:
        import triton as _triton
        import triton.language as _tl
    except ImportError:  # no Triton for this system: the references run
        pass
    else:
        HAS_TRITON, triton, tl = True, _triton, _tl


Result = TypeVar("Result")
"""What a kernel returns: a tensor, or a tuple of them."""


@dataclass(frozen=True)
class Case:
    """Arguments on which a kernel's two versions must agree.

    Attributes:
        name: says what is special about it.
        make: builds the arguments (a tuple) on a device; the same on every call.
        moved: bytes read and written, for the benchmark.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    moved: int


@dataclass(frozen=True)
class Kernel(Generic[Result]):
    """One operation in two versions, and for some a third.

    Attributes:
        name: its name in tests, benchmarks and error messages: the module's, a dot, and its own.
        reference: plain torch, any device.
        fast: launches Triton; the same signature and result.
        cases: arguments for the parity test.
        large: for the benchmark, a case that moves about as many bytes as it is told.
        plain: for the benchmark, the torch expression over whole tensors that a user would write instead. It takes the
            arguments of `large` and may round otherwise, or draw other random numbers.
        native: for the memory of a CPU, in C; the same signature, and the same result bit for bit. It falls back on
            `reference` by itself where it has no library, or these tensors are not for it.
        tolerance: how far apart `fast` and `reference` may be, as a part of the result's largest magnitude. 0: bit
            for bit; else a reduction, whose order differs, or a function that is not correctly rounded everywhere.
    """

    name: str
    reference: Callable[..., Result]
    fast: Callable[..., Result]
    cases: Callable[[], Iterable[Case]]
    large: Callable[[int], Case] | None = None
    plain: Callable[..., Any] | None = None
    tolerance: float = 0.0
    native: Callable[..., Result] | None = None

    def __call__(self, *args: Any, **options: Any) -> Result:
        """Run `fast` where a GPU holds the output or the first tensor, or is the device asked for; else `native`, `reference`."""
        if HAS_TRITON and _on_gpu(args, options):
            return self.fast(*args, **options)
        return (self.native or self.reference)(*args, **options)


def defined_in(module: ModuleType) -> tuple[Kernel[Any], ...]:
    """Return the kernels that a module of this package defines, in their order."""
    start = module.__name__.rpartition(".")[2] + "."
    return tuple(value for value in vars(module).values() if isinstance(value, Kernel) and value.name.startswith(start))


def programs_of(device: torch.device) -> int:
    """Return how many programs of a few warps keep a device busy: two for each of a GPU's multiprocessors."""
    if device.type != "cuda":
        return 8  # the interpreter's
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on_gpu(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    first = _first_tensor((options.get("out"), *args))
    if first is not None:
        return first.is_cuda
    asked = options.get("device") or next((value for value in args if isinstance(value, torch.device)), None)
    return asked is not None and torch.device(asked).type == "cuda"


def _first_tensor(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values
    if isinstance(values, tuple | list):
        for value in values:
            found = _first_tensor(value)
            if found is not None:
                return found
    return None

"""torch as the judge of what a file holds."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from sdformats.pickle import PickleSource, open_pickle
from sdformats.tensor import DType, Spec
from sdformats.torch_sink import TorchZipSink

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.torch_pickle import Tree

TYPES = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.int16: DType.I16,
    torch.uint16: DType.U16,
    torch.int32: DType.I32,
    torch.uint32: DType.U32,
    torch.int64: DType.I64,
    torch.uint64: DType.U64,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.complex64: DType.C64,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.float8_e4m3fnuz: DType.F8_E4M3FNUZ,
    torch.float8_e5m2fnuz: DType.F8_E5M2FNUZ,
    torch.float8_e8m0fnu: DType.F8_E8M0,
}


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def save(value: Any, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tuple(tensor.shape), TYPES[tensor.dtype]) for name, tensor in tensors.items()}


def write(path: Path, tensors: Mapping[str, torch.Tensor], tree: Tree = None, *, block: int = 1 << 20) -> Path:
    """Write by our own sink, in blocks."""
    with TorchZipSink(path, specs_of(tensors), tree, overwrite=True) as sink:
        for name, tensor in tensors.items():
            data = raw(tensor)
            for at in range(0, len(data), block):
                sink.write(name, at, memoryview(data)[at : at + block])
    return path


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal in types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def check(path: Path, expected: dict[str, torch.Tensor]) -> PickleSource:
    """Read every tensor, in two odd blocks, and compare."""
    with open_pickle(path) as source:
        assert set(source.specs) == set(expected)
        for name, tensor in expected.items():
            spec = source.specs[name]
            assert spec.shape == tuple(tensor.shape)
            assert spec.dtype is TYPES[tensor.dtype]
            data = bytearray(spec.nbytes)
            middle = spec.nbytes // 3
            source.read_into(name, middle, memoryview(data)[middle:])
            source.read_into(name, 0, memoryview(data)[:middle])
            assert data == raw(tensor), name
        source.verify()
        return source


def flatten(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        pairs = [
            (k.decode("utf-8", "backslashreplace") if isinstance(k, bytes) else k, item) for k, item in value.items()
        ]
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        return {}
    return {k: t for key, item in pairs for k, t in flatten(item, f"{name}.{key}" if name else str(key)).items()}

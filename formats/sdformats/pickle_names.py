"""Every class and function that a model file's pickle may name, and what it is taken for. There are no others.

The names are compared as text and never looked up in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdformats.tensor import DType


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. It stays a name. Hashable, as a class can be a dict key."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


STORAGES = {
    "BoolStorage": DType.BOOL,
    "ByteStorage": DType.U8,
    "CharStorage": DType.I8,
    "ShortStorage": DType.I16,
    "IntStorage": DType.I32,
    "LongStorage": DType.I64,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "FloatStorage": DType.F32,
    "DoubleStorage": DType.F64,
    "ComplexFloatStorage": DType.C64,
}
"""Typed storages of module ``torch``."""

UNTYPED = {
    Global("torch.storage", "UntypedStorage"),
    Global("torch.storage", "_UntypedStorage"),
    Global("torch", "UntypedStorage"),
}

TORCH_TYPES = {
    "bool": DType.BOOL,
    "uint8": DType.U8,
    "int8": DType.I8,
    "int16": DType.I16,
    "uint16": DType.U16,
    "int32": DType.I32,
    "uint32": DType.U32,
    "int64": DType.I64,
    "uint64": DType.U64,
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float32": DType.F32,
    "float64": DType.F64,
    "complex64": DType.C64,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "float8_e4m3fnuz": DType.F8_E4M3FNUZ,
    "float8_e5m2fnuz": DType.F8_E5M2FNUZ,
    "float8_e8m0fnu": DType.F8_E8M0,
}
"""Element types of module ``torch`` (``torch.float32`` and so on)."""

NUMPY_TYPES = {
    "b1": DType.BOOL,
    "u1": DType.U8,
    "i1": DType.I8,
    "u2": DType.U16,
    "i2": DType.I16,
    "u4": DType.U32,
    "i4": DType.I32,
    "u8": DType.U64,
    "i8": DType.I64,
    "f2": DType.F16,
    "f4": DType.F32,
    "f8": DType.F64,
    "c8": DType.C64,
}
"""numpy's codes of element types, without byte order."""

PLAIN = {
    Global("builtins", "set"),
    Global("builtins", "frozenset"),
    Global("builtins", "bytes"),
    Global("builtins", "bytearray"),
    Global("collections", "OrderedDict"),
    Global("collections", "defaultdict"),
    Global("collections", "Counter"),
    Global("_codecs", "encode"),
    Global("torch", "Size"),
}
"""Python's own containers, and the one way in which protocol 2 spells bytes."""

REBUILD = {
    Global("torch._utils", "_rebuild_tensor"),
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_tensor_v3"),
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
    Global("torch._utils", "_rebuild_device_tensor_from_numpy"),
    Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
    Global("torch._tensor", "_rebuild_from_type_v2"),
    Global("torch.storage", "_load_from_bytes"),
}

ARRAYS = {
    Global("numpy", "ndarray"),
    Global("numpy", "dtype"),
    Global("numpy.core.multiarray", "_reconstruct"),
    Global("numpy.core.multiarray", "scalar"),
    Global("numpy.core.numeric", "_frombuffer"),
}

PARAMETER_LISTS = {
    Global("torch.nn.modules.container", "ParameterDict"),
    Global("torch.nn.modules.container", "ParameterList"),
}
"""Modules that are nothing but named tensors; original textual inversion keeps its embeddings in one."""

_CALLBACKS = ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
_OMEGACONF = (
    "dictconfig.DictConfig",
    "listconfig.ListConfig",
    "base.ContainerMetadata",
    "base.Metadata",
    "nodes.AnyNode",
    "nodes.StringNode",
    "nodes.IntegerNode",
    "nodes.FloatNode",
    "nodes.BooleanNode",
    "nodes.BytesNode",
    "nodes.PathNode",
    "nodes.EnumNode",
    "nodes.InterpolationResultNode",
)


def _split(full: str) -> Global:
    module, _, name = full.rpartition(".")
    return Global(module, name)


OPAQUE = {
    *(_split(f"pytorch_lightning.callbacks.{name}") for name in _CALLBACKS),
    *(_split(f"lightning.pytorch.callbacks.{name}") for name in _CALLBACKS),
    *(_split(f"omegaconf.{name}") for name in _OMEGACONF),
    Global("pytorch_lightning.utilities.parsing", "AttributeDict"),
    Global("lightning_fabric.utilities.data", "AttributeDict"),
    Global("lightning.fabric.utilities.data", "AttributeDict"),
    Global("argparse", "Namespace"),
    Global("pathlib", "PosixPath"),
    Global("pathlib", "WindowsPath"),
    Global("pathlib", "PurePosixPath"),
    Global("pathlib", "PureWindowsPath"),
    Global("typing", "Any"),
    Global("builtins", "dict"),
    Global("builtins", "list"),
    Global("builtins", "tuple"),
    Global("builtins", "int"),
    Global("builtins", "float"),
    Global("builtins", "str"),
    Global("builtins", "bool"),
    Global("builtins", "object"),
    Global("builtins", "complex"),
    Global("torch", "device"),
    Global("torch", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.serialization", "_get_layout"),
    Global("copyreg", "_reconstructor"),
}
"""Met in real checkpoints beside the weights. What is made of them is kept as a node without behaviour."""

UNSUPPORTED = {
    Global("torch._utils", "_rebuild_sparse_tensor"): "a sparse tensor",
    Global("torch._utils", "_rebuild_sparse_csr_tensor"): "a sparse tensor",
    Global("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    Global("torch._utils", "_rebuild_qtensor"): "a quantised tensor",
    Global("torch._utils", "_rebuild_meta_tensor_no_storage"): "a tensor without data (on the meta device)",
    Global("torch._utils", "_rebuild_wrapper_subclass"): "a tensor of a class of its own",
    **{
        Global("torch", f"{kind}Storage"): f"a tensor of type {kind}"
        for kind in ("ComplexDouble", "ComplexHalf", "QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    },
    **{
        Global("torch", kind): f"a tensor of type {kind}"
        for kind in ("complex128", "complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4",
                     "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
    },
}  # fmt: skip
"""Recognised, and refused by name."""

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def normal_name(module: str, name: str) -> Global:
    """Return the name under today's spelling: Python 2's modules, and numpy 2's private ones, were renamed."""
    module = _RENAMED.get(module, module)
    if module.startswith("numpy._core."):
        module = "numpy.core." + module.removeprefix("numpy._core.")
    return Global(module, name)


def is_known(found: Global) -> bool:
    """Whether a pickle may name this."""
    if found.module == "torch" and (found.name in STORAGES or found.name in TORCH_TYPES):
        return True
    if found.module == "numpy.dtypes" and found.name.isidentifier() and found.name.endswith("DType"):
        return True
    return any(found in table for table in (PLAIN, REBUILD, ARRAYS, UNTYPED, PARAMETER_LISTS, OPAQUE))

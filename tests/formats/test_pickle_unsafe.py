"""Files that would run code or cost far more than they are worth: refused in one line, and nothing happens."""

from __future__ import annotations

import ast
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import sdformats
from sdformats.errors import CorruptFile, UnsafeFile, UnsupportedFile
from sdformats.pickle import open_pickle
from tests.formats import hostile_pickles as h

if TYPE_CHECKING:
    from collections.abc import Iterator


MODULES = ("arrays", "contents", "crc", "opcodes", "pickle", "pickle_names", "pickle_stream", "place", "rebuild", "records",
           "strided", "torchlegacy", "torchzip")  # fmt: skip


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[str]:
    """A shell command that leaves a file; afterwards there must be none."""
    trace = tmp_path / "ran"
    yield f"touch {trace}"
    assert not trace.exists()


# Row 1: whatever a pickle could call.
CALLS = [
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "subprocess.check_output", "pty.spawn",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.getattr", "builtins.setattr", "builtins.__import__",
    "builtins.open", "builtins.input", "builtins.breakpoint", "builtins.map", "builtins.apply", "builtins.memoryview",
    "builtins.print", "builtins.type", "builtins.globals", "builtins.vars", "builtins.delattr", "builtins.range",
    "functools.partial", "functools.reduce", "operator.attrgetter", "operator.methodcaller", "operator.itemgetter",
    "importlib.import_module", "runpy.run_path", "runpy._run_code", "code.interact", "pdb.run", "timeit.main",
    "ctypes.CDLL", "webbrowser.open", "socket.create_connection", "urllib.request.urlopen", "requests.get", "shutil.rmtree",
    "pickle.loads", "_pickle.loads", "cloudpickle.loads", "dill.loads", "marshal.loads", "types.FunctionType", "types.CodeType",
    "numpy.load", "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef", "numpy.ma.core._mareconstruct",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.serialization.load", "torch._dynamo.guards.GuardBuilder",
    "torch.utils._config_module.load_config", "torch.distributed.rpc.internal._deserialize", "torch.storage._load",
    "torch._utils._import_dotted_name", "torch._utils._rebuild_parameter_x", "torch.Storage", "torch._C._cuda_init",
    "torch.fx.graph._PyTreeCodeGen", "idlelib.pyshell.ModifiedInterpreter.runcommand", "lib2to3.pgen2.pgen.ParserGenerator",
    "asyncio.unix_events._UnixSubprocessTransport._start", "profile.run", "cProfile.runctx", "trace.Trace.run", "bdb.Bdb.run",
    "codecs.encode", "_codecs.decode", "codecs.open", "copyreg.add_extension", "collections.namedtuple", "collections.UserDict",
    "_io.FileIO", "io.open", "bz2.open", "logging.config.fileConfig", "pathlib.Path", "pathlib.PosixPath.unlink",
    "argparse.FileType", "omegaconf.OmegaConf.load", "omegaconf.dictconfig.DictConfig._get_node", "numpy.dtypes.os.systemDType",
    "pytorch_lightning.callbacks.model_checkpoint.os", "__main__.Model", "diffusers.pipelines.X",
    "collections.OrderedDict.update",
]  # fmt: skip


@pytest.mark.parametrize("full", CALLS)
def test_no_name_outside_the_table_is_taken(tmp_path: Path, canary: str, full: str) -> None:
    module, _, attribute = full.rpartition(".")
    named, stacked = h.name(module, attribute), h.stack_name(module, attribute)
    for value in (
        h.call(named, canary),
        h.call(stacked, canary),
        h.new(named, canary),
        h.build(h.new(named), {"x": canary}),
        {named: 1},
        [h.Raw(b"(" + h.dump(canary) + b"0" + named + b"1"), 3],
        h.call(h.name("copyreg", "_reconstructor"), named, None, None),
        h.call(h.name("collections", "defaultdict"), named),
        h.call(h.name("torch._tensor", "_rebuild_from_type_v2"), named, h.name("torch", "Tensor"), (canary,), None),
        h.Raw(h.dump(("storage", named, "0", "cpu", 6)) + b"Q"),
    ):
        h.assert_refused_value(tmp_path, value, UnsafeFile, "which other programs would import|code and all")
        bare = tmp_path / "bare.pkl"
        bare.write_bytes(h.program(value, 4))
        h.assert_refused(bare, UnsafeFile, "which other programs would import|code and all")
        old = tmp_path / "old.pt"
        old.write_bytes(h.legacy(value, []))
        h.assert_refused(old, UnsafeFile, "which other programs would import|code and all")


@pytest.mark.parametrize(
    "full",
    [
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.container.Sequential",
        "transformers.models.clip.CLIPTextModel",
    ],
)
def test_whole_models_are_refused_by_name(tmp_path: Path, full: str) -> None:
    module, _, attribute = full.rpartition(".")
    value = h.build(h.new(h.name(module, attribute)), {"_parameters": {}})
    h.assert_refused_value(tmp_path, value, UnsafeFile, rf"whole object \({full}\).*state_dict")


@pytest.mark.parametrize("code", ["i", "o", "S", "V", "g", "p", "P", "L", "F", "\x82", "\x83", "\x84", "\x97"])
def test_old_and_outside_opcodes_are_refused(tmp_path: Path, code: str) -> None:
    h.assert_refused_value(
        tmp_path, b"\x80\x02" + code.encode("latin1") + b"posix\nsystem\n.", UnsupportedFile, "has a pickle that uses"
    )


def test_values_that_pretend_to_be_functions(tmp_path: Path) -> None:
    for value in (
        h.Raw(h.dump("os.system") + b"(tR"),
        h.Raw(h.dump({}) + b"(tR"),
        h.Raw(h.tensor() + b"(tR"),
        h.Raw(h.name("torch", "FloatStorage") + b"(tR"),
        h.Raw(h.name("torch", "float32") + h.dump(3) + b"R"),
        h.Raw(h.dump(7) + b")\x81"),
        h.call(h.name("copyreg", "_reconstructor"), "os.system"),
    ):
        h.assert_refused_value(tmp_path, value, CorruptFile, "calls what is no function|makes an object of")


def test_opaque_objects_take_everything_and_do_nothing(tmp_path: Path, canary: str) -> None:
    node = h.new(h.name("argparse", "Namespace"), canary)
    node = h.Raw(
        node + h.dump({"__class__": canary, "__setstate__": canary}) + b"b" + h.dump(canary) + b"a" + b"(KaKbu"
    )
    value = {"opaque": node, "path": h.call(h.name("pathlib", "PosixPath"), "/etc", "passwd"), "t": h.tensor()}
    with open_pickle(h.write_zip(tmp_path / "x.pt", value)) as source:
        assert list(source.specs) == ["t"]
        assert source.notes == (
            "left out, as they are no tensors: opaque [argparse.Namespace], path [pathlib.PosixPath]",
        )


def test_no_module_of_the_reader_can_run_anything() -> None:
    """No import of an unpickler, no import by name, nothing evaluated, and attributes only by constant names."""
    forbidden = {
        "pickle",
        "_pickle",
        "pickletools",
        "importlib",
        "marshal",
        "shelve",
        "copyreg",
        "runpy",
        "torch",
        "ctypes",
    }
    for module in MODULES:
        tree = ast.parse((Path(sdformats.__file__).parent / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden
            if isinstance(node, ast.Name):
                assert node.id not in {
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "getattr",
                    "setattr",
                    "globals",
                    "vars",
                    "open",
                }


# Row 2: one file for the checker, another for the reader.
def test_a_pickle_in_front_and_a_zip_behind(tmp_path: Path) -> None:
    behind = h.build_zip(h.torch_members({"a": h.tensor()}), front=h.program({}))
    path = tmp_path / "x.pt"
    path.write_bytes(behind)
    h.assert_refused(path, UnsafeFile, "bytes after its pickle")
    path.write_bytes(h.legacy({}, []) + h.build_zip(h.torch_members({})))
    h.assert_refused(path, CorruptFile, "after its last storage")


def test_something_in_front_of_the_first_member(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    members = h.torch_members({"a": h.tensor()})
    path.write_bytes(h.build_zip(members, front=h.build_zip([h.Zipped("archive/data.pkl", b"x")])))
    h.assert_refused(path, UnsafeFile, "in front of its first member")


# Row 5: keys that take for ever to compare.
def test_only_plain_keys(tmp_path: Path) -> None:
    nested = b"\x80\x02})" + b"2\x86" * 45 + b"Ns."
    h.assert_refused_value(tmp_path, nested, UnsafeFile, "dict key that is a tuple")
    for key in ((), None, 1.5, True, h.tensor(), h.new(h.name("argparse", "Namespace"))):
        h.assert_refused_value(tmp_path, {"x": h.Raw(b"}" + h.dump(key) + b"Ns")}, UnsafeFile, "dict key that is a")


def test_numbers_made_to_collide(tmp_path: Path) -> None:
    keys = b"".join(h.dump(i * (2**61 - 1)) + b"N" for i in range(1, 10_100))
    h.assert_refused_value(tmp_path, b"\x80\x02}(" + keys + b"u.", UnsafeFile, "too many large numbers as dict keys")
    few = b"".join(h.dump(i * (2**61 - 1)) + b"N" for i in range(1, 50))
    with open_pickle(h.write_zip(tmp_path / "x.pt", b"\x80\x02}(" + few + b"u.")) as source:
        assert source.specs == {}


def test_nesting_and_sharing(tmp_path: Path) -> None:
    h.assert_refused_value(
        tmp_path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", UnsafeFile, "nested too deeply"
    )
    h.assert_refused_value(tmp_path, b"\x80\x02]q\0h\0a.", UnsafeFile, "nested too deeply")
    laughs = b"\x80\x02(]" + b"q\0](h\0h\0h\0h\0h\0h\0h\0h\0h\0h\0e" * 40 + b"t."
    h.assert_refused_value(tmp_path, laughs, UnsafeFile, "too many values")
    node = h.name("argparse", "Namespace")
    chain = b"\x80\x02" + node + b"q\0)\x81" + b"q\x010h\0)\x81h\x01b" * 50_000 + b"."
    with open_pickle(h.write_zip(tmp_path / "x.pt", chain)) as source:
        assert source.notes == ("left out, as they are no tensors: the whole [argparse.Namespace]", "holds no tensors")


def test_what_is_held_is_never_printed(tmp_path: Path) -> None:
    """A report of an error shows local variables; one of these would take for ever to write out."""
    laughs = b"\x80\x02(]" + b"q\0](h\0h\0h\0h\0h\0h\0h\0h\0h\0h\0e" * 40
    with pytest.raises(CorruptFile) as caught:
        open_pickle(h.write_zip(tmp_path / "x.pt", laughs + b"."))
    trace: Any = caught.value.__traceback__
    while trace is not None:
        if "self" in trace.tb_frame.f_locals:
            assert len(repr(trace.tb_frame.f_locals["self"])) < 1000
        trace = trace.tb_next


def test_too_many_steps(tmp_path: Path) -> None:
    h.assert_refused_value(tmp_path, b"\x80\x02" + b"N0" * 1_100_000 + b"N.", UnsafeFile, "too many steps")
    many = b"\x80\x02](" + b"N" * 100_000 + b"eq\0" + b"".join(
        h.name("builtins", "set") + b"h\0\x85R" for _ in range(30)) + b"."  # fmt: skip
    h.assert_refused_value(tmp_path, many, UnsafeFile, "too many steps")


# Row 6: calls that would need gigabytes.
def test_nothing_is_called_with_what_the_file_says(tmp_path: Path) -> None:
    encode = h.name("_codecs", "encode")
    value: Any = "41" * 1000
    for _ in range(30):
        value = h.call(encode, value, "hex")
    h.assert_refused_value(tmp_path, value, UnsafeFile, "encodes text as 'hex'")
    for codec in ("zip", "rot13", "utf-16", "idna", "base64_codec"):
        h.assert_refused_value(tmp_path, h.call(encode, "x", codec), UnsafeFile, "encodes text as")
    h.assert_refused_value(
        tmp_path, h.call(h.name("torch.storage", "UntypedStorage"), 1 << 40), CorruptFile, "makes an object of"
    )
    for taker in ("bytearray", "bytes"):
        h.assert_refused_value(
            tmp_path, h.call(h.name("builtins", taker), 64 << 30), CorruptFile, "malformed arguments"
        )
    size = 1 << 20
    many = (
        b"\x80\x02]"
        + h.dump("x" * size)
        + b"q\0a"
        + (h.name("_codecs", "encode") + b"h\0X\6\0\0\0latin1\x86Ra") * 70
        + b"."
    )
    tracemalloc.start()
    h.assert_refused_value(tmp_path, many, UnsafeFile, "grows when it is read")
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


# Row 13: a small file that claims to hold much.
def test_more_than_the_file_is_worth(tmp_path: Path) -> None:
    h.assert_refused_value(
        tmp_path, {"a": h.tensor((1 << 40,), (0,))}, UnsafeFile, "claims 4,398,046,511,104 bytes of tensors"
    )
    big = bytes(1 << 20)
    held = h.storage("0", 1 << 18)
    value = {f"t{i}": h.tensor((1 << 18,), (1,), 0, held) for i in range(3000)}
    h.assert_refused_value(tmp_path, value, UnsafeFile, "claims 3,145,728,000 bytes", records={"0": big})


# Row 19: attributes that hide methods.
def test_attributes_hide_nothing(tmp_path: Path) -> None:
    value = h.Raw(h.call(h.name("collections", "OrderedDict")) + b"(" + h.dump("a") + h.tensor() + b"u")
    value = h.build(value, {"items": h.name("torch", "Size"), "__class__": 3, "_metadata": {}})
    with open_pickle(h.write_zip(tmp_path / "x.pt", value)) as source:
        assert source.read("a") == h.FLOATS
        assert source.notes == ("left out: attributes of dicts or tensors ('__class__', 'items')",)

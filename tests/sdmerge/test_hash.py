"""Hashes against hashlib, and the one over the tensors alone against every way of storing the same tensors."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sdformats.errors import ChangedFile, CorruptFile, FormatError
from sdformats.files import open_source
from sdmerge import hashing
from sdmerge.cli.hash import hash_command

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def tensors() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(7)
    return {
        "unet.b": torch.randn(
            300, 1000, generator=source
        ),  # 1.2 MB: more than one chunk, and past the legacy hash's place
        "unet.a": torch.randn(3, 5, generator=source).half(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "é": torch.arange(7, dtype=torch.int64),
        "h": torch.randn(9, generator=source).bfloat16(),
    }


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.bfloat16: "BF16"}


def plain(values: Mapping[str, Tensor]) -> str:
    """Compute the hash over tensors from its description."""
    stream = b""
    for name in sorted(values, key=str.encode):
        value = values[name].contiguous()
        shape = ",".join(str(size) for size in value.shape)
        said = name.encode()
        stream += (
            str(len(said)).encode() + b":" + said + b"\0" + NAMES[value.dtype].encode() + b"\0" + shape.encode() + b"\n"
        )
        stream += value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return hashlib.sha256(stream).hexdigest()


def found(path: Path) -> hashing.Hashes:
    with open_source(path) as source:
        return hashing.hashes(source)


def stored(path: Path, how: str) -> Path:
    values = tensors()
    if how == "safetensors":
        save_file(values, path)
    elif how == "metadata":
        save_file(values, path, metadata={"title": "another"})
    elif how == "reordered":
        _raw(path, {name: values[name] for name in sorted(values, reverse=True)})
    elif how == "sharded":
        path.mkdir()
        placed = {name: f"m-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(values)}
        for shard in set(placed.values()):
            save_file({name: values[name] for name in values if placed[name] == shard}, path / shard)
        (path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    elif how == "strided":
        torch.save({name: _transposed(value) for name, value in values.items()}, path)
    else:
        torch.save({"state_dict": values}, path, _use_new_zipfile_serialization=how == "zip")
    return path


def _transposed(value: Tensor) -> Tensor:
    return value.t().contiguous().t() if value.dim() == 2 else value


def _raw(path: Path, values: Mapping[str, Tensor]) -> None:
    """Write safetensors in an order of one's own."""
    header: dict[str, Any] = {}
    data = b""
    for name, value in values.items():
        piece = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("how", ["safetensors", "metadata", "reordered", "sharded", "zip", "legacy", "strided"])
def test_the_tensors_have_one_hash_however_they_are_stored(tmp_path: Path, how: str) -> None:
    assert found(stored(tmp_path / "m", how)).tensors == plain(tensors())


@pytest.mark.parametrize("how", ["safetensors", "zip", "legacy"])
def test_the_hashes_of_a_file(tmp_path: Path, how: str) -> None:
    path = stored(tmp_path / "m", how)
    data = path.read_bytes()
    got = found(path)
    assert got.sha256 == hashlib.sha256(data).hexdigest()
    assert got.autov2 == hashlib.sha256(data).hexdigest()[:10]
    assert len(data) > 0x110000
    assert got.legacy == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert got.autov3 == (hashlib.sha256(body).hexdigest()[:12] if how == "safetensors" else None)


def test_metadata_changes_the_file_but_not_autov3(tmp_path: Path) -> None:
    one, two = found(stored(tmp_path / "a", "safetensors")), found(stored(tmp_path / "b", "metadata"))
    assert one.sha256 != two.sha256
    assert one.autov3 == two.autov3


@pytest.mark.parametrize("size", [0x100000 - 1, 0x100000, 0x100000 + 5, 0x110000, 0x110000 + 1])
def test_the_legacy_hash_of_a_short_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m"
    header = (
        json.dumps({"x": {"dtype": "U8", "shape": [size - 200], "data_offsets": [0, size - 200]}}).encode().ljust(192)
    )
    path.write_bytes(struct.pack("<Q", 192) + header + os.urandom(size - 200))
    assert found(path).legacy == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


def test_a_folder_has_only_the_hash_of_its_tensors(tmp_path: Path) -> None:
    inner = tmp_path / "unet"
    inner.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    save_file({"x": torch.ones(3)}, inner / "diffusion_pytorch_model.safetensors")
    got = found(tmp_path)
    assert got == hashing.Hashes(None, None, None, None, plain({"unet.x": torch.ones(3)}))


def test_any_change_of_a_tensor_changes_the_hash(tmp_path: Path) -> None:
    base = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(2)}
    variants = [
        base,
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"a": base["a"].reshape(1, 4), "b": base["b"]},
        {"a": base["a"] + torch.tensor([0, 0, 0, 1e-6]), "b": base["b"]},
        {"a": base["a"].view(torch.bfloat16), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
        {"a": base["a"], "b": base["b"], "z": torch.zeros(0)},
        {"a": base["a"].flip(0), "b": base["b"]},
    ]
    hashes = []
    for i, values in enumerate(variants):
        save_file(values, tmp_path / str(i))
        hashes.append(found(tmp_path / str(i)).tensors)
    assert len(set(hashes)) == len(variants)


def test_a_name_cannot_pass_for_the_bytes_of_another_tensor(tmp_path: Path) -> None:
    """Without its length in front, the second file's one name would read like the first file's two tensors."""
    two = {"a": np.frombuffer(b"xyz", np.uint8), "b": np.frombuffer(b"q", np.uint8)}
    one = {"a\0U8\x003\nxyzb": two["b"]}
    from safetensors.numpy import save_file as save_numpy

    save_numpy(two, tmp_path / "two")
    save_numpy(one, tmp_path / "one")
    assert found(tmp_path / "two").tensors != found(tmp_path / "one").tensors


def test_a_file_that_changed_has_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path / "m", "safetensors")
    original = hashing.tensor_hash

    def meddle(*args: Any) -> str:
        os.utime(path, ns=(0, 0))
        return original(*args)

    monkeypatch.setattr(hashing, "tensor_hash", meddle)
    with pytest.raises(ChangedFile):
        found(path)


def test_a_wrong_checksum_is_no_hash(tmp_path: Path) -> None:
    path = stored(tmp_path / "m", "zip")
    data = bytearray(path.read_bytes())
    at = data.index(tensors()["unet.b"].numpy().tobytes()[:64])
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile):
        found(path)


def test_progress_adds_up(tmp_path: Path) -> None:
    for how in ("safetensors", "zip", "sharded"):
        done: list[int] = []
        with open_source(stored(tmp_path / how, how)) as source:
            hashing.hashes(source, done.append)
            assert sum(done) == hashing.cost(source)


def test_the_command_prints_json(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.safetensors", "safetensors")
    result = CliRunner().invoke(hash_command, [str(path), str(tmp_path / "gone"), "--json"], standalone_mode=False)
    assert result.return_value == 1
    good, bad = json.loads(result.stdout)
    assert set(good) == {"path", "sha256", "autov2", "autov3", "legacy", "tensors"}
    assert good["tensors"] == plain(tensors())
    assert set(bad) == {"path", "error"}
    assert "does not exist" in result.stderr


def test_the_command_shows_every_hash(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.safetensors", "safetensors")
    result = CliRunner().invoke(hash_command, [str(path)], standalone_mode=False)
    assert result.return_value == 0
    got = found(path)
    for value in (got.sha256, got.autov2, got.autov3, got.legacy, got.tensors):
        assert f" {value} " in result.stdout


def test_hashing_needs_no_torch(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.ckpt", "zip")
    code = (
        "import sys; from sdmerge.cli import root\n"
        f"root.main(['hash', {str(path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment(), capture_output=True)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = stored(tmp_path / "m", "safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        found(path)
    assert "\n" not in str(caught.value)

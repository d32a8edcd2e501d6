"""Diffusers folders and sharded sets: what is chosen, what is told, and indices that lie."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sdformats.errors import ChangedFile, CorruptFile, FormatError, UnknownFormat
from sdformats.files import open_source
from sdformats.folder import FolderSource, ShardedSource

if TYPE_CHECKING:
    from pathlib import Path

UNET = "diffusion_pytorch_model"


def weights(path: Path, *names: str, fill: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full((2, 3), fill + i, np.float32) for i, name in enumerate(names)}, path)
    return path


def index(path: Path, placed: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return path


def pipeline(path: Path) -> Path:
    weights(path / "unet" / f"{UNET}.safetensors", "conv_in.weight", fill=1)
    weights(path / "vae" / f"{UNET}.safetensors", "decoder.conv_in.weight", fill=2)
    weights(path / "text_encoder" / "model.safetensors", "text_model.x", fill=3)
    weights(path / "safety_checker" / "model.safetensors", "concept_embeds", fill=4)
    for name in ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor"):
        (path / name).mkdir()
        (path / name / "config.json").write_text("{}")
    (path / "model_index.json").write_text("{}")
    return path


def sharded(path: Path, stem: str = "model") -> Path:
    weights(path / f"{stem}-00001-of-00002.safetensors", "a", "b", fill=10)
    weights(path / f"{stem}-00002-of-00002.safetensors", "c", fill=20)
    one, two = f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"
    return index(path / "model.safetensors.index.json", {"a": one, "b": one, "c": two})


def first(path: Path, name: str) -> float:
    with open_source(path) as source:
        return float(np.frombuffer(source.read(name), np.float32)[0])


def notes(path: Path) -> str:
    with open_source(path) as source:
        return " | ".join(source.notes)


def refusal(path: Path, kind: type[FormatError] = CorruptFile) -> str:
    with pytest.raises(kind) as caught:
        open_source(path).close()
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)
    return str(caught.value)


def test_a_pipeline_is_one_source_with_names_by_component(tmp_path: Path) -> None:
    with open_source(pipeline(tmp_path)) as source:
        assert isinstance(source, FolderSource)
        assert source.container == "folder"
        assert set(source.specs) == {
            "unet.conv_in.weight",
            "vae.decoder.conv_in.weight",
            "text_encoder.text_model.x",
            "safety_checker.concept_embeds",
        }
        assert source.specs["unet.conv_in.weight"].shape == (2, 3)
        assert source.notes == ()
        assert len(source.files) == 4
    assert first(tmp_path, "vae.decoder.conv_in.weight") == 2


def test_components_are_enough_without_a_pipeline_index(tmp_path: Path) -> None:
    (pipeline(tmp_path) / "model_index.json").unlink()
    with open_source(tmp_path) as source:
        assert source.container == "folder"


def test_position_names_the_file_and_the_offset(tmp_path: Path) -> None:
    with open_source(pipeline(tmp_path)) as source:
        for name in source.specs:
            file, offset = source.position(name)
            size = source.specs[name].nbytes
            assert source.files[file].read(offset, size) == bytes(source.read(name))


def test_part_of_a_tensor_is_read_at_its_offset(tmp_path: Path) -> None:
    save_file({"x": np.arange(6, dtype=np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    part = bytearray(8)
    with open_source(tmp_path) as source:
        source.read_into("x", 8, memoryview(part))
    assert np.frombuffer(part, np.float32).tolist() == [2, 3]


def test_a_changed_part_is_noticed(tmp_path: Path) -> None:
    with open_source(pipeline(tmp_path)) as source:
        source.verify()
        with (tmp_path / "vae" / f"{UNET}.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ChangedFile, match="vae"):
            source.verify()


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], "pytorch_model.bin"),
        (["a_note.safetensors", "model.safetensors"], "model.safetensors"),
    ],
)
def test_the_choice_among_variants_is_told(tmp_path: Path, there: list[str], taken: str) -> None:
    inner = pipeline(tmp_path) / "text_encoder"
    (inner / "model.safetensors").unlink()
    for name in there:
        tensors = {f"from {name}": torch.zeros(2)}
        if name.endswith(".bin"):
            torch.save(tensors, inner / name)
        else:
            weights(inner / name, *tensors)
    with open_source(tmp_path) as source:
        assert f"text_encoder.from {taken}" in source.specs
        (note,) = source.notes
    left = ", ".join(sorted(set(there) - {taken}))
    assert note == f"text_encoder: read {taken}, not {left}"
    assert notes(inner) == f"read {taken}, not {left}"  # the same for the component alone


def test_a_model_beside_a_pipeline_is_told(tmp_path: Path) -> None:
    weights(pipeline(tmp_path) / "v1-5-pruned.safetensors", "x")
    assert notes(tmp_path) == "read the components, not v1-5-pruned.safetensors"


def test_a_component_of_pickles_only(tmp_path: Path) -> None:
    torch.save({"x": torch.full((2,), 5.0)}, tmp_path / f"{UNET}.bin")
    assert first(tmp_path, "x") == 5


def test_a_pipeline_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert "without weights" in refusal(tmp_path, UnknownFormat)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "without model weights" in refusal(tmp_path, UnknownFormat)


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    weights(tmp_path / "one.safetensors", "x")
    weights(tmp_path / "two.safetensors", "x")
    message = refusal(tmp_path, UnknownFormat)
    assert "one.safetensors" in message
    assert "two.safetensors" in message


def test_a_sharded_set_by_its_index_and_by_its_folder(tmp_path: Path) -> None:
    for path in (sharded(tmp_path), tmp_path):
        with open_source(path) as source:
            assert isinstance(source, ShardedSource)
            assert source.container == "sharded"
            assert list(source.specs) == ["a", "b", "c"]
            assert source.position("c")[0] == 1
            assert source.notes == ()
        assert first(path, "c") == 20


def test_a_component_may_be_sharded(tmp_path: Path) -> None:
    (pipeline(tmp_path) / "text_encoder" / "model.safetensors").unlink()
    sharded(tmp_path / "text_encoder")
    with open_source(tmp_path) as source:
        assert {"text_encoder.a", "text_encoder.c", "unet.conv_in.weight"} <= set(source.specs)
        file, offset = source.position("text_encoder.c")
        assert source.files[file].read(offset, 4) == np.float32(20).tobytes()


@pytest.mark.parametrize("name", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_the_index_of_a_variant_is_an_index(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, "model.fp16").rename(tmp_path / name)
    with open_source(tmp_path) as source:
        assert list(source.specs) == ["a", "b", "c"]


def test_the_full_set_comes_before_a_variant(tmp_path: Path) -> None:
    sharded(tmp_path, "model.fp16").rename(tmp_path / "model.safetensors.index.fp16.json")
    sharded(tmp_path)
    assert notes(tmp_path) == "read model.safetensors.index.json, not model.safetensors.index.fp16.json"


def test_a_shard_is_never_taken_for_the_model(tmp_path: Path) -> None:
    sharded(tmp_path).unlink()
    with pytest.raises(CorruptFile, match="no index"):
        open_source(tmp_path)
    weights(tmp_path / "model.fp16.safetensors", "whole")
    with open_source(tmp_path) as source:
        assert list(source.specs) == ["whole"]
        assert "model-00002-of-00002.safetensors" in source.notes[0]


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "C:x", "", ".", ".."])
def test_an_index_stays_in_its_folder(tmp_path: Path, shard: str) -> None:
    weights(tmp_path / "x.safetensors", "k")
    bad = index(tmp_path / "inner" / "m.safetensors.index.json", {"k": shard})
    assert "'k'" in refusal(bad)


@pytest.mark.parametrize("shard", [3, None, ["x"], {}])
def test_an_index_names_files(tmp_path: Path, shard: Any) -> None:
    assert "'k'" in refusal(index(tmp_path / "m.safetensors.index.json", {"k": shard}))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(path)


def test_a_key_that_its_shard_has_not(tmp_path: Path) -> None:
    weights(tmp_path / "s.safetensors", "a")
    assert "'b'" in refusal(index(tmp_path / "m.index.json", {"a": "s.safetensors", "b": "s.safetensors"}))


def test_a_key_that_the_index_has_not(tmp_path: Path) -> None:
    weights(tmp_path / "s.safetensors", "a", "b")
    message = refusal(index(tmp_path / "m.index.json", {"a": "s.safetensors"}))
    assert "'b'" in message
    assert "no file" in message


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    weights(tmp_path / "s.safetensors", "a")
    weights(tmp_path / "t.safetensors", "a", "c")
    assert "'a'" in refusal(index(tmp_path / "m.index.json", {"a": "s.safetensors", "c": "t.safetensors"}))


def test_two_components_that_make_one_name(tmp_path: Path) -> None:
    weights(tmp_path / "x" / "model.safetensors", "y.z")
    weights(tmp_path / "x.y" / "model.safetensors", "z")
    assert "'x.y.z'" in refusal(tmp_path)


def test_a_key_that_the_index_says_twice(tmp_path: Path) -> None:
    weights(tmp_path / "s.safetensors", "a")
    path = tmp_path / "m.index.json"
    path.write_text('{"weight_map": {"a": "gone.safetensors", "a": "s.safetensors"}}')
    assert "twice" in refusal(path)


@pytest.mark.parametrize("name", ["m.safetensors.index.json", "looks_fine.safetensors"])
def test_an_index_that_names_itself(tmp_path: Path, name: str) -> None:
    assert "JSON" in refusal(index(tmp_path / name, {"a": name}), UnknownFormat)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": ',
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": ' + "[" * 100_000,
        '{"weight_map": "\xff',
    ],
)
def test_an_index_that_is_broken(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_bytes(text.encode("latin-1"))
    refusal(path)


def test_an_index_that_is_too_large(tmp_path: Path) -> None:
    path = index(tmp_path / "m.safetensors.index.json", {"a": "x"})
    with path.open("ab") as file:
        file.truncate(1 << 30)
    assert "too large" in refusal(path)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    assert "Permission denied" in refusal(tmp_path, FormatError)


def test_a_broken_part_closes_the_others(tmp_path: Path) -> None:
    path = pipeline(tmp_path) / "vae" / f"{UNET}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="vae"):
        open_source(tmp_path)  # an unclosed file would be a ResourceWarning, and warnings are errors

"""Mixing, stacking and slicing against torch; embeddings in and out of adapters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sdmerge
from sdformats.adapters.errors import CannotHold
from sdformats.errors import FormatError
from sdmerge import cli
from sdmerge.embeddings import (
    bundle_embeddings,
    extract_embeddings,
    mix_embeddings,
    slice_embedding,
    stack_embeddings,
)
from sdmerge.errors import FamilyError, MismatchError, RequestError
from tests.sdmerge.embedding import samples

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def put(folder: Path, name: str, encoders: str = "clip_l", count: int = 2, **options: object) -> dict[str, Tensor]:
    given = samples.vectors(encoders, count, seed=len(name) + ord(name[0]), **options)  # type: ignore[arg-type]
    samples.put("kohya", folder, given, stem=name)
    return given


def result(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def test_a_weighted_sum_is_rounded_once(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a", dtype=torch.float16), put(tmp_path, "b", dtype=torch.float16)
    out = tmp_path / "o.safetensors"
    report = mix_embeddings([(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", 0.3)], out)
    expected = 0.7 * one["clip_l"].double().numpy() + 0.3 * two["clip_l"].double().numpy()
    # numpy rounds float64 to float16 once; torch goes by way of float32.
    assert torch.equal(result(out)["emb_params"], torch.from_numpy(expected.astype(np.float16)))
    assert (report.tensors, report.family) == (1, "sd1")
    texts = samples.texts_of(out)
    assert json.loads(texts["sdmerge.embedding"]) == {
        "mix": [{"name": "a.safetensors", "weight": 0.7}, {"name": "b.safetensors", "weight": 0.3}]
    }
    assert texts["name"] == "o"


def test_without_weights_it_is_the_mean_and_weights_can_be_normalized(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a", "clip_l clip_g"), put(tmp_path, "b", "clip_l clip_g")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    mix_embeddings(paths, tmp_path / "m.safetensors")
    mix_embeddings([(paths[0], 3), (paths[1], 1)], tmp_path / "n.safetensors", normalize=True)
    for name in one:
        a, b = one[name].double(), two[name].double()
        assert torch.equal(result(tmp_path / "m.safetensors")[name], ((a + b) / 2).float())
        assert torch.equal(result(tmp_path / "n.safetensors")[name], (0.75 * a + 0.25 * b).float())


def test_norms_can_be_kept(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a"), put(tmp_path, "b")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    mix_embeddings(paths, tmp_path / "m.safetensors", keep_norm=True)
    found = result(tmp_path / "m.safetensors")["emb_params"].double()
    wanted = (one["clip_l"].double().norm(dim=1) + two["clip_l"].double().norm(dim=1)) / 2
    torch.testing.assert_close(found.norm(dim=1), wanted, rtol=1e-6, atol=0)
    direction = one["clip_l"].double() + two["clip_l"].double()
    torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), direction / direction.norm(dim=1, keepdim=True))


def test_different_numbers_of_vectors(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a", count=1), put(tmp_path, "b", count=3)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(MismatchError, match=r"1, 3 vectors.*--pad"):
        mix_embeddings(paths, tmp_path / "m.safetensors")
    mix_embeddings(paths, tmp_path / "m.safetensors", pad=True)
    expected = two["clip_l"].double() / 2
    expected[:1] += one["clip_l"].double() / 2
    assert torch.equal(result(tmp_path / "m.safetensors")["emb_params"], expected.float())


def test_stacks_are_exact(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a", count=1), put(tmp_path, "b", count=3)
    stack_embeddings([tmp_path / "b.safetensors", tmp_path / "a.safetensors"], tmp_path / "s.safetensors", token="pile")
    expected = torch.cat([two["clip_l"], one["clip_l"]])
    assert samples.bits(result(tmp_path / "s.safetensors")["emb_params"]) == samples.bits(expected)
    assert samples.texts_of(tmp_path / "s.safetensors")["name"] == "pile"
    half = put(tmp_path, "c", dtype=torch.float16)
    report = stack_embeddings([tmp_path / "c.safetensors", tmp_path / "a.safetensors"], tmp_path / "t.pt")
    found = torch.load(tmp_path / "t.pt", weights_only=True)["string_to_param"]["*"]
    assert torch.equal(found, torch.cat([half["clip_l"].float(), one["clip_l"]]))
    assert any("written in F32" in note for note in report.notes)


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        ("0:2", [0, 1]),
        ("-1", [4]),
        ("0,2,3:5", [0, 2, 3, 4]),
        (":", [0, 1, 2, 3, 4]),
        ("-2:", [3, 4]),
        ("3, 1", [3, 1]),
    ],
)
def test_slices(tmp_path: Path, which: str, rows: list[int]) -> None:
    given = put(tmp_path, "a", "clip_l clip_g", count=5)
    slice_embedding(tmp_path / "a.safetensors", tmp_path / "s.safetensors", vectors=which)
    for name, tensor in result(tmp_path / "s.safetensors").items():
        assert samples.bits(tensor) == samples.bits(given[name][rows])


@pytest.mark.parametrize("which", ["5", "-6", "2:2", "x", "", "1:2:3", "4:9,9", "0:2,"])
def test_slices_of_nothing_are_refused(tmp_path: Path, which: str) -> None:
    put(tmp_path, "a", count=5)
    with pytest.raises(RequestError):
        slice_embedding(tmp_path / "a.safetensors", tmp_path / "s.safetensors", vectors=which)
    assert not (tmp_path / "s.safetensors").exists()


def test_one_word_of_several(tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(1, 768), "<b>": torch.zeros(3, 768)}, tmp_path / "i.safetensors")
    slice_embedding(tmp_path / "i.safetensors", tmp_path / "o.pt", word="<b>")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["string_to_param"]["*"].shape == (3, 768)
    with pytest.raises(RequestError, match="no word '<c>'"):
        slice_embedding(tmp_path / "i.safetensors", tmp_path / "p.pt", word="<c>")
    with pytest.raises(RequestError, match="2 words"):
        mix_embeddings([tmp_path / "i.safetensors"] * 2, tmp_path / "p.pt")


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b", "clip_l clip_g")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for make in (mix_embeddings, stack_embeddings):
        with pytest.raises(MismatchError, match="clip_g 1280 and clip_l 768 wide.*one family"):
            make(paths, tmp_path / "o.safetensors")
        with pytest.raises(FamilyError, match="not for sdxl"):
            make(paths[:1] * 2, tmp_path / "o.safetensors", for_family="sdxl")
        with pytest.raises(RequestError, match="two or more"):
            make(paths[:1], tmp_path / "o.safetensors")
    with pytest.raises(RequestError, match="add up to nothing"):
        mix_embeddings([(paths[0], 1), (paths[0], -1)], tmp_path / "o.safetensors", normalize=True)
    with pytest.raises(RequestError, match="finite"):
        mix_embeddings([(paths[0], 1), (paths[0], float("nan"))], tmp_path / "o.safetensors")


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(path: Path, width: int = 768, **extra: Tensor) -> Path:
    tensors = {
        f"{KEY}.lora_down.weight": torch.ones(2, width),
        f"{KEY}.lora_up.weight": torch.ones(320, 2),
        f"{KEY}.alpha": torch.tensor(2.0),
    }
    save_file(tensors | extra, path)
    return path


def test_into_an_adapter_and_out_again(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "l.safetensors")
    given = put(tmp_path, "mycat", count=3)
    bundled = tmp_path / "b.safetensors"
    bundle_embeddings(adapter, [tmp_path / "mycat.safetensors"], bundled)
    found = load_file(bundled)
    assert samples.bits(found.pop("bundle_emb.mycat.string_to_param.*")) == samples.bits(given["clip_l"])
    assert found.keys() == load_file(adapter).keys()
    extract_embeddings(bundled, tmp_path / "o.safetensors", to="diffusers")
    out = load_file(tmp_path / "o.safetensors")
    assert list(out) == ["mycat"]
    assert samples.bits(out["mycat"]) == samples.bits(given["clip_l"])
    with pytest.raises(RequestError, match="called mycat in the adapter already"):
        bundle_embeddings(bundled, [tmp_path / "mycat.safetensors"], tmp_path / "c.safetensors")
    bundle_embeddings(bundled, [tmp_path / "mycat.safetensors"], tmp_path / "c.safetensors", token="dog")
    assert "bundle_emb.dog.string_to_param.*" in load_file(tmp_path / "c.safetensors")


def test_adapters_that_carry_nothing_and_families_that_differ(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "l.safetensors")
    with pytest.raises(RequestError, match="carries none at all"):
        extract_embeddings(adapter, tmp_path / "o.pt")
    put(tmp_path, "x", "clip_l clip_g")
    with pytest.raises(FamilyError, match=r"is for sdxl, and .* for sd1"):
        bundle_embeddings(adapter, [tmp_path / "x.safetensors"], tmp_path / "o.safetensors")
    put(tmp_path, "y")
    with pytest.raises(RequestError, match="embedding extract"):
        stack_embeddings([adapter, tmp_path / "y.safetensors"], tmp_path / "o.safetensors")
    save_file({"conv.weight": torch.ones(2, 3, 4)}, tmp_path / "n.safetensors")
    with pytest.raises(FormatError, match="is other .expected an embedding"):
        slice_embedding(tmp_path / "n.safetensors", tmp_path / "x.pt", vectors="0")
    torch.save(torch.ones(1, 768), tmp_path / "v.pt")
    slice_embedding(tmp_path / "v.pt", tmp_path / "w.pt", vectors="0")
    with pytest.raises(FormatError, match="is an aesthetic embedding"):
        slice_embedding(tmp_path / "v.pt", tmp_path / "x.pt", vectors="0", kind="aesthetic")
    xlabs = {f"double_blocks.0.processor.qkv_lora1.{half}.weight": torch.ones(shape)
             for half, shape in (("down", (2, 3072)), ("up", (9216, 2)))}  # fmt: skip
    save_file(xlabs, tmp_path / "f.safetensors")
    put(tmp_path, "z", "clip_l t5")
    with pytest.raises(CannotHold, match="embeddings"):
        bundle_embeddings(tmp_path / "f.safetensors", [tmp_path / "z.safetensors"], tmp_path / "o.safetensors")


def test_merging_models_is_not_for_embeddings(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b")
    with pytest.raises(RequestError, match="sdmerge embedding mix"):
        sdmerge.weighted_sum(
            [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], output=tmp_path / "o.safetensors"
        )


def test_the_command_line(tmp_path: Path) -> None:
    one, two = put(tmp_path, "a"), put(tmp_path, "b")
    names = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]

    def run(*args: str) -> dict[str, object]:
        done = CliRunner().invoke(cli.root, ["embedding", *args, "--json"], standalone_mode=False)
        assert done.exception is None, done.exception
        return dict(json.loads(done.stdout))

    out = str(tmp_path / "m.safetensors")
    assert run("mix", f"{names[0]}:0.7", f"{names[1]}:0.3", "-o", out)["written"] is True
    expected = (0.7 * one["clip_l"].double() + 0.3 * two["clip_l"].double()).float()
    assert torch.equal(load_file(out)["emb_params"], expected)
    run("mix", *names, "-o", str(tmp_path / "mean.pt"))
    run("stack", *names, "-o", str(tmp_path / "s.pt"), "--token", "pile")
    assert torch.load(tmp_path / "s.pt", weights_only=True)["name"] == "pile"
    run("slice", str(tmp_path / "s.pt"), "--vectors", "1:3", "-o", str(tmp_path / "c.bin"), "--for", "sd1")
    lora(tmp_path / "l.safetensors")
    run("bundle", str(tmp_path / "l.safetensors"), *names, "-o", str(tmp_path / "w.safetensors"))
    run("extract", str(tmp_path / "w.safetensors"), "--word", "b", "-o", str(tmp_path / "b.pt"))
    found = torch.load(tmp_path / "b.pt", weights_only=True)["string_to_param"]["*"]
    assert samples.bits(found) == samples.bits(two["clip_l"])

"""What `sdmerge inspect` says, to people and to machines, and what it costs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from sdformats.errors import FormatError
from sdmerge.cli.inspect import inspect
from sdmerge.inspection import inspect_path

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

PROMISED = {
    "path", "container", "kind", "family", "variant", "layout", "components", "tensors", "parameters", "dtypes", "bytes",
    "metadata", "warnings",
}  # fmt: skip
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def sd1() -> dict[str, torch.Tensor]:
    """Return the marks of an SD1 checkpoint, with 9 input channels: 12 blocks, a convolution before the attention."""
    found = {f"{UNET}input_blocks.{i}.0.in_layers.2.weight": torch.ones(2, 2, 3, 3) for i in range(1, 12)}
    found[f"{UNET}input_blocks.0.0.weight"] = torch.ones(2, 9, 3, 3)
    found[f"{UNET}input_blocks.1.1.proj_in.weight"] = torch.ones(2, 2, 1, 1)
    found[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.ones(2, 3)
    return found | {f"{VAE}decoder.up.0.block.0.conv1.weight": torch.ones(5).half(), "betas": torch.ones(7)}


def saved(path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(sd1(), path, metadata=metadata)
    return path


def run(*args: str) -> Result:
    return CliRunner().invoke(inspect, list(args), standalone_mode=False)


def listed(*args: str) -> list[dict[str, Any]]:
    result = run(*args, "--json")
    assert result.exception is None
    return list(json.loads(result.stdout))


def test_json_has_what_is_promised(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", {"title": "a model"})
    unet = 11 * 36 + 2 * 9 * 9 + 4 + 6
    assert listed(str(path)) == [
        {
            "path": str(path),
            "container": "safetensors",
            "kind": "checkpoint",
            "family": "sd1",
            "variant": "inpainting",
            "layout": "single-file",
            "components": {"unet": unet, "vae": 5, "other": 7},
            "tensors": 16,
            "parameters": unet + 12,
            "dtypes": {"F16": 1, "F32": 15},
            "bytes": path.stat().st_size,
            "metadata": {"title": "a model"},
            "warnings": [],
        }
    ]


def test_tensors_are_listed_on_request(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    (entry,) = listed(str(path), "--tensors")
    assert set(entry) == {*PROMISED, "list"}
    assert len(entry["list"]) == 16
    assert {"name": "betas", "dtype": "F32", "shape": [7]} in entry["list"]


def test_every_container_says_the_same(tmp_path: Path) -> None:
    torch.save({"state_dict": sd1(), "global_step": 3}, tmp_path / "m.ckpt")
    (one,) = listed(str(saved(tmp_path / "m.safetensors")))
    (two,) = listed(str(tmp_path / "m.ckpt"))
    assert two["container"] == "torch-zip"
    assert two["metadata"]["global_step"] == "3"
    for key in PROMISED - {"path", "container", "bytes", "metadata"}:
        assert one[key] == two[key]


def test_a_folder(tmp_path: Path) -> None:
    for component, name, size in (("unet", "diffusion_pytorch_model", 4), ("text_encoder", "model", 6)):
        (tmp_path / component).mkdir()
        save_file({"x": torch.ones(size)}, tmp_path / component / f"{name}.safetensors")
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not looked at")
    (entry,) = listed(str(tmp_path))
    assert (entry["container"], entry["tensors"], entry["parameters"]) == ("folder", 2, 10)
    read = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    assert entry["bytes"] == sum((tmp_path / name).stat().st_size for name in read)
    assert "fp16" in entry["warnings"][0]


def test_a_path_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    bad.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    args = (str(tmp_path / "gone"), str(good), str(bad))
    result = run(*args, "--json")
    assert result.return_value == 1
    gone, fine, pointer = json.loads(result.stdout)
    assert set(gone) == set(pointer) == {"path", "error"}
    assert set(fine) == PROMISED
    assert "git-lfs" in pointer["error"]
    shown = run(*args)
    assert shown.return_value == 1
    assert "sd1 inpainting checkpoint" in shown.stdout
    assert [line.split(":")[0] for line in shown.stderr.splitlines()] == ["error", "error"]


def test_a_person_reads_parts_types_and_size(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", {"title": "a model", "long": "x" * 500})
    result = run(str(path))
    assert result.return_value == 0
    said = ("m.safetensors", "sd1 inpainting checkpoint", "single-file names", "16 tensors", "unet", "vae", "F16 1")
    for text in (*said, "a model"):
        assert text in result.stdout
    assert "x" * 81 not in result.stdout
    assert "500 characters" in result.stdout


def test_nothing_in_a_file_steers_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[31m\u202egnp\r\n\x9b2J"
    path = tmp_path / "m.safetensors"
    save_file({evil: torch.ones(1), "b": torch.ones(1)}, path, metadata={evil: evil})
    for args in ((), ("--tensors",), ("--json", "--tensors")):
        result = run(str(path), *args)
        assert result.return_value == 0
        assert not {"\x1b", "\x07", "\u202e", "\r", "\x9b"} & set(result.stdout + result.stderr)
        assert "owned" in result.stdout


def test_the_family_can_be_said(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "m.safetensors"))
    assert listed(path, "--family", "sd2")[0]["family"] == "sd2"
    (entry,) = listed(path, "--family", "sd9")
    assert "sd9" in entry["error"]
    assert inspect_path(path, family="sdxl")["family"] == "sdxl"


def test_two_readings_are_told_and_can_be_decided(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save(torch.ones(1, 768), path)
    (entry,) = listed(str(path))
    assert set(entry) == {*PROMISED, "title", "readings", "details"}
    assert (entry["kind"], entry["family"], entry["readings"]) == ("ambiguous", "sd1", ["embedding", "aesthetic"])
    assert "--as embedding|aesthetic" in entry["warnings"][0]
    (decided,) = listed(str(path), "--as", "aesthetic")
    assert (decided["kind"], decided["layout"], decided["warnings"]) == ("aesthetic", "bare", [])
    assert "an aesthetic embedding" in run(str(path), "--as", "aesthetic").stdout
    assert "cannot be read as adapter" in listed(str(path), "--as", "adapter")[0]["error"]


def test_the_python_function_raises(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        inspect_path(tmp_path / "gone")


LAYERS = 3500
EACH = 1_000_000


def full_size(path: Path) -> int:
    """Write a header of 3500 tensors and 7 GB of nothing, which takes no room on the disk. Return the size."""
    header = {
        f"{UNET}input_blocks.{i % 9}.{i}.weight": {
            "dtype": "F16",
            "shape": [1000, EACH // 1000],
            "data_offsets": [2 * EACH * i, 2 * EACH * (i + 1)],
        }
        for i in range(LAYERS)
    }
    text = json.dumps(header).encode()
    size = 8 + len(text) + 2 * EACH * LAYERS
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(size)
    return size


MEASURE = """
import json, resource, sys
import sdmerge.inspection
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
idle = peak()
found = sdmerge.inspection.inspect_path(sys.argv[1])
print(json.dumps({"grown": peak() - idle, "torch": "torch" in sys.modules, "found": found}))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows fills the hole with zeros, and has no resource module")
def test_seven_gigabytes_cost_no_memory_and_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    size = full_size(path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, timeout=60)
    got = json.loads(done.stdout)
    assert size > 7_000_000_000
    assert got["found"]["bytes"] == size
    assert got["found"]["parameters"] == LAYERS * EACH
    assert got["grown"] < 50_000_000
    assert not got["torch"]


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    code = (
        "import sys; from sdmerge.cli import root\n"
        f"root.main(['inspect', {str(path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_an_embedding_is_told_in_words(tmp_path: Path) -> None:
    vectors = torch.eye(4, 768) * torch.tensor([[1.0], [2.0], [4.0], [float("nan")]])
    tree = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat-3", "step": 1234,
            "sd_checkpoint": "abcd", "sd_checkpoint_name": "sd-v1-5"}  # fmt: skip
    torch.save(tree, tmp_path / "cat.pt")
    (entry,) = listed(str(tmp_path / "cat.pt"))
    assert entry["details"] == {
        "name": "cat-3", "step": 1234, "trained_on": "sd-v1-5", "checkpoint_hash": "abcd", "trainer": "A1111's web UI",
        "words": [{"token": None, "vectors": {"clip_l": [4, 768]}, "outputs": {},
                   "norms": {"clip_l": [1.0, 2.0, 4.0, None]}}],
    }  # fmt: skip
    seen = run(str(tmp_path / "cat.pt")).stdout
    for text in ("cat (programs go by the file's name)", "4 for CLIP-L (768 wide)", "▃▅█? 1 to 4", "cat-3", "1,234 steps",
                 "sd-v1-5 [abcd]", "A1111's web UI"):  # fmt: skip
        assert text in seen
    assert "string_to_token" not in seen


def test_a_broken_embedding_is_still_told(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(1, 768), "clip_l": torch.ones(1, 768)}, tmp_path / "b.safetensors")
    (entry,) = listed(str(tmp_path / "b.safetensors"))
    assert (entry["kind"], entry["details"]) == ("embedding", None)
    assert "names of one text encoder and of several" in entry["warnings"][0]


def test_vectors_of_a_type_that_is_not_computed_with(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768).to(torch.float8_e4m3fn)}, tmp_path / "e.safetensors")
    (entry,) = listed(str(tmp_path / "e.safetensors"))
    assert entry["details"]["words"][0]["norms"] == {"clip_l": None}
    assert "2 for CLIP-L" in run(str(tmp_path / "e.safetensors")).stdout


def test_a_hypernetwork_is_told_in_words(tmp_path: Path) -> None:
    def side() -> dict[str, torch.Tensor]:
        shapes = {"linear.0.weight": (1536, 768), "linear.0.bias": (1536,), "linear.2.weight": (768, 1536),
                  "linear.2.bias": (768,)}  # fmt: skip
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    settings = {
        "step": 5000,
        "name": "h",
        "layer_structure": [1, 2, 1],
        "activation_func": "relu",
        "activate_output": False,
    }
    torch.save({768: (side(), side()), **settings}, tmp_path / "h.pt")
    (entry,) = listed(str(tmp_path / "h.pt"))
    assert (entry["kind"], entry["details"]["activation"], entry["details"]["widths"]) == (
        "hypernetwork",
        "relu",
        [768],
    )
    seen = run(str(tmp_path / "h.pt")).stdout
    for text in ("a hypernetwork", "1, 2, 1", "relu", "5,000"):
        assert text in seen


def test_many_texts_are_cut_for_people(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "m.safetensors", {f"k{i:03}": "v" for i in range(200)})
    seen = run(str(tmp_path / "m.safetensors")).stdout
    assert "k079" in seen
    assert "k080" not in seen
    assert "120 more; --json shows all" in seen


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        ({"clip_image": torch.ones(2, 768)}, "clip-inversion", {"vectors": 2, "width": 768}),
        ({"0": torch.ones(1, 77, 768), "1": torch.ones(1, 77, 768)}, "null-text", {"steps": 2, "width": 768}),
        (
            {
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(320, 768),
                "modifier_token.<new1>": torch.ones(768),
            },
            "custom-diffusion",
            {"trained": ["to_k"], "words": {"<new1>": [768]}},
        ),
    ],
)
def test_other_small_files_are_told(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str, said: dict[str, object]
) -> None:
    save_file(tensors, tmp_path / "s.safetensors")
    (entry,) = listed(str(tmp_path / "s.safetensors"))
    assert entry["kind"] == kind
    assert {key: entry["details"][key] for key in said} == said
    seen = run(str(tmp_path / "s.safetensors")).stdout
    assert all(key in seen for key in said)

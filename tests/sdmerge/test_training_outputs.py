"""What training runs leave: DreamBooth's folders and DreamArtist's pairs are named for what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import sdmerge
from sdformats.dreamartist import pair_of
from sdformats.errors import UnknownFormat

if TYPE_CHECKING:
    from pathlib import Path

UNET = {
    "conv_in.weight": torch.ones(4, 4, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(4, 768),
}
VAE = {"decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3)}


def weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"))


def step(folder: Path) -> None:
    """Write what diffusers' trainers keep of a step, by accelerate."""
    weights(folder / "unet", UNET)
    for name in ("optimizer.bin", "scheduler.bin", "scaler.pt", "sampler_1.bin"):
        torch.save({"state": {0: torch.ones(3)}}, folder / name)
    (folder / "random_states_0.pkl").write_bytes(b"no pickle at all")


class TestDreamBooth:
    def test_steps_inside_are_no_components(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        weights(out / "unet", UNET)
        weights(out / "vae", VAE)
        (out / "model_index.json").write_text("{}")
        before = sdmerge.inspect_path(out)
        for number in (500, 1000):
            step(out / f"checkpoint-{number}")
        after = sdmerge.inspect_path(out)
        assert (after["tensors"], after["components"]) == (before["tensors"], before["components"])
        assert after["warnings"] == [
            "a training run's output; its steps are left aside: checkpoint-1000, checkpoint-500", *before["warnings"]
        ]  # fmt: skip

    def test_a_step_alone(self, tmp_path: Path) -> None:
        step(tmp_path / "checkpoint-500")
        found = sdmerge.inspect_path(tmp_path / "checkpoint-500", tensors=True)
        assert {one["name"] for one in found["list"]} == {f"unet.{name}" for name in UNET}
        assert "a step of a training run: what was trained, and no whole model" in found["warnings"]

    def test_a_run_that_did_not_end(self, tmp_path: Path) -> None:
        step(tmp_path / "out" / "checkpoint-500")
        with pytest.raises(UnknownFormat, match=r"nothing but its steps .checkpoint-500.; name one of them"):
            sdmerge.inspect_path(tmp_path / "out")


class TestDreamArtist:
    def test_both_of_a_pair_are_named(self, tmp_path: Path) -> None:
        for name in ("style", "style-neg", "alone", "lost-neg"):
            value = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(3, 768)}, "name": name}
            torch.save(value, tmp_path / f"{name}.pt")
        said = "a DreamArtist pair: style.pt belongs in the prompt, style-neg.pt in the negative prompt"
        for name, paired in (("style", True), ("style-neg", True), ("alone", False), ("lost-neg", False)):
            found = sdmerge.inspect_path(tmp_path / f"{name}.pt")
            assert found["kind"] == "embedding"
            assert (said in found["warnings"]) == paired
        assert pair_of(tmp_path / "style-neg.pt") == (tmp_path / "style.pt", tmp_path / "style-neg.pt")
        assert pair_of(tmp_path / "none.pt") is None

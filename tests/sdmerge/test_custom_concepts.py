"""Custom Diffusion's deltas: compressed, and merged in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import sdmerge
from sdformats.errors import FormatError
from sdmerge.cli import root
from sdmerge.custom.captions import captions
from sdmerge.custom.concepts import Residual, merged_weight, plane
from sdmerge.errors import FamilyError, MismatchError, RequestError
from tests.formats.pickle_oracle import same
from tests.sdmerge import toys
from tests.sdmerge.custom_deltas import (
    MODEL,
    TINY,
    WORDS,
    base,
    equal,
    load,
    names,
    save,
    trained,
    vector,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


class TestCompression:
    def ranks(self, value: Mapping[str, Any]) -> set[int]:
        return {pair["u"].shape[1] for pair in value["unet"].values()}

    def test_it_is_the_best_of_its_rank(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.bin", "delta", trained(1), WORDS)
        sdmerge.compress_custom(path, tmp_path / "c.bin", base=MODEL, rank=6)
        value = torch.load(tmp_path / "c.bin", weights_only=True)
        assert self.ranks(value) == {6}
        assert equal(value["modifier_token"], WORDS)
        for key, old in base().items():
            pair = value["unet"][names()[key]]
            change = trained(1)[key].double() - old.double()
            u, s, v = torch.linalg.svd(change)
            best = u[:, :6] @ torch.diag(s[:6]) @ v[:6]
            made = pair["u"].double() @ pair["v"].double()
            assert (made - change).norm() <= (best - change).norm() * (1 + 1e-5)
            assert torch.allclose(pair["v"] @ pair["v"].T, torch.eye(6), atol=1e-4)  # v = Vᵀ, u = U S
            assert torch.allclose(pair["u"].norm(dim=0).double(), s[:6], rtol=1e-4)

    def test_whole_again_with_the_model(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.ckpt", "original", trained(1), WORDS)
        sdmerge.compress_custom(path, tmp_path / "c.ckpt", base=MODEL, energy=1.0)
        assert sdmerge.inspect_path(tmp_path / "c.ckpt")["layout"] == "compressed"
        sdmerge.convert(tmp_path / "c.ckpt", tmp_path / "w.ckpt", base=MODEL, dtype="fp32")
        found, words = load(tmp_path / "w.ckpt")
        assert all(torch.allclose(found[key], tensor, atol=1e-4) for key, tensor in trained(1).items())
        assert equal(words, WORDS)
        with pytest.raises(FormatError, match="these are compressed; name the model with --base"):
            sdmerge.convert(tmp_path / "c.ckpt", tmp_path / "d", to="diffusers")

    @pytest.mark.parametrize("name", ["c.bin", "c.safetensors"])
    def test_a_size_is_kept(self, tmp_path: Path, name: str) -> None:
        path = save(tmp_path / "a.bin", "delta", trained(1), WORDS)
        sdmerge.compress_custom(path, tmp_path / name, base=MODEL, size=60_000)
        assert 50_000 < (tmp_path / name).stat().st_size <= 60_000

    def test_it_is_a_lora(self, tmp_path: Path) -> None:
        """In an adapter's layout, and baked from either, to the same weights."""
        path = save(tmp_path / "a.bin", "delta", trained(1), {})
        sdmerge.compress_custom(path, tmp_path / "c.bin", base=MODEL, rank=6)
        sdmerge.convert(tmp_path / "c.bin", tmp_path / "lora.safetensors", to="kohya")
        held = load_file(tmp_path / "lora.safetensors")
        value = torch.load(tmp_path / "c.bin", weights_only=True)["unet"]
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        stem = "lora_unet_" + name.replace(".", "_")
        assert torch.equal(held[f"{stem}.lora_up.weight"], value[f"{name}.weight"]["u"])
        assert torch.equal(held[f"{stem}.lora_down.weight"], value[f"{name}.weight"]["v"])
        assert float(held[f"{stem}.alpha"]) == 6
        for file in ("c.bin", "lora.safetensors"):
            sdmerge.bake(MODEL, [(tmp_path / file, 0.5)], output=tmp_path / f"{file}.safetensors", dtype="fp32")
        assert same(load_file(tmp_path / "c.bin.safetensors"), load_file(tmp_path / "lora.safetensors.safetensors"))

    def test_what_cannot_be(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.bin", "delta", trained(1), {})
        with pytest.raises(RequestError, match="give one of rank, size, energy, error"):
            sdmerge.compress_custom(path, tmp_path / "c.bin", base=MODEL)
        with pytest.raises(RequestError, match="sdmerge compress-custom DELTA --base MODEL"):
            sdmerge.convert(path, tmp_path / "c.bin", to="compressed")
        with pytest.raises(RequestError, match="is checkpoint .expected a Custom Diffusion delta"):
            sdmerge.compress_custom(MODEL, tmp_path / "c.bin", base=MODEL, rank=1)
        with pytest.raises(MismatchError, match=r"is \[8, 6\], and the delta has|has no "):
            sdmerge.compress_custom(path, tmp_path / "c.bin", base=toys.saved(tmp_path, "toy", 1), rank=1)
        with pytest.raises(RequestError, match=r"'kohyaa' is no form of a delta"):
            sdmerge.convert(path, tmp_path / "c.bin", to="kohyaa")


def kkt(weight: np.ndarray, text: np.ndarray, wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return argmin ‖(W' - W) Kᵀ‖ with W' Tᵀ = Vᵀ, by the Karush-Kuhn-Tucker equations."""
    count, width = text.shape
    system = np.block([[2 * known.T @ known, text.T], [text, np.zeros((count, count))]])
    right = np.concatenate([np.zeros((width, weight.shape[0])), wanted - text @ weight.T])
    found: np.ndarray = weight + np.linalg.solve(system, right)[:width].T
    return found


class TestConcepts:
    def problem(self, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Return a matrix, the concepts' matrices and features (with one token in common), and everything else's features."""
        source = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        weight, known, common = random(10, 24), random(300, 24), random(1, 24)
        own = [weight + 0.1 * random(10, 24) for _ in range(2)]
        return weight, own, [torch.cat([common, random(4, 24)]), torch.cat([random(3, 24), common, common])], known

    @pytest.mark.parametrize("seed", range(5))
    def test_the_closed_form_is_the_constrained_least_squares(self, seed: int) -> None:
        weight, own, texts, known = self.problem(seed)
        held = plane(known, texts)
        assert len(held.features) == 8
        residual = Residual()
        found = merged_weight(weight, *own, held=held, residual=residual)
        wanted = torch.stack([held.features @ one.T for one in own])
        shared = wanted.mean(0)
        only = [
            torch.tensor([i for i in held.owners[side].tolist() if i not in held.owners[1 - side].tolist()])
            for side in (0, 1)
        ]
        for side in (0, 1):
            shared[only[side]] = wanted[side][only[side]]
        expected = kkt(weight.numpy(), held.features.numpy(), shared.numpy(), known.numpy())
        assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-9)
        assert residual.largest < 1e-12
        assert (held.features @ found.T - shared).abs().max() < 1e-10

    def test_everything_else_changes_less_than_by_an_average(self) -> None:
        weight, own, texts, known = self.problem(9)
        found = merged_weight(weight, *own, held=plane(known, texts), residual=Residual())
        average = (own[0] + own[1]) / 2
        assert ((found - weight) @ known.T).norm() < ((average - weight) @ known.T).norm()

    def test_too_few_captions_and_concepts_that_are_one(self) -> None:
        _, _, texts, known = self.problem(0)
        for few in (known[:20], known[:1].expand(300, 24)):
            with pytest.raises(RequestError, match="too few or too much alike"):
                plane(few, texts)
        double = torch.cat([texts[0], 2 * texts[0][:1]])
        with pytest.raises(RequestError, match="cannot be told apart"):
            plane(known, [double, texts[1]])

    def test_two_deltas_of_the_tiny_model(self, tmp_path: Path) -> None:
        one = save(tmp_path / "a.ckpt", "original", trained(1), {"<new1>": vector(1)})
        two = save(tmp_path / "b", "diffusers", trained(2), {"<new1>": vector(2)})
        report = sdmerge.merge_custom(
            [(one, "star"), (two, "heart")], tmp_path / "m.bin", base=MODEL, to="delta", model_config=TINY / "config"
        )
        assert "the word <new1> of delta 2 is called <new2>, as another delta has it too" in report.notes
        (said,) = [note for note in report.notes if "matrices make of" in note]
        assert said.startswith("32 matrices make of 15 tokens")
        assert float(said.rpartition(" ")[2]) < 1e-6
        weights, words = load(tmp_path / "m.bin")
        assert equal(words, {"<new1>": vector(1), "<new2>": vector(2)})
        texts = {"<new1>": ("star", trained(1)), "<new2>": ("heart", trained(2))}
        features = encoded([f"{word} {name}" for word, (name, _) in texts.items()], words)
        for (_, own), rows in zip(texts.values(), features, strict=True):
            for key, tensor in weights.items():
                made, expected = (rows @ matrix.double().T for matrix in (tensor, own[key]))
                assert (made - expected).norm() / expected.norm() < 1e-5  # float32 in the file, and in the encoder

    def test_what_cannot_be_merged(self, tmp_path: Path) -> None:
        one = save(tmp_path / "a.ckpt", "original", trained(1), {"<new1>": vector(1)})
        bare = save(tmp_path / "n.bin", "delta", trained(2), {})
        for deltas, says in (
            ([(one, "star")], "one delta is no merge"),
            ([(one, "star"), (bare, "heart")], "n.bin: has no word for its concept"),
        ):
            with pytest.raises(RequestError, match=says):
                sdmerge.merge_custom(deltas, tmp_path / "m.bin", base=MODEL, model_config=TINY / "config")
        wide = {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(8, 1024)}}
        narrow = {"unet": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(8, 768)}}
        files = []
        for name, value in (("w", wide), ("s", narrow)):
            torch.save(value | {"modifier_token": {"<new1>": torch.ones(8)}}, tmp_path / f"{name}.bin")
            files.append((tmp_path / f"{name}.bin", "cat"))
        with pytest.raises(FamilyError, match="different families: sd1, sd2"):
            sdmerge.merge_custom(files, tmp_path / "m.bin", base=MODEL)
        assert not (tmp_path / "m.bin").exists()

    def test_captions(self, tmp_path: Path) -> None:
        ours = captions(None)
        assert (len(ours), len(set(ours))) == (200, 200)
        (tmp_path / "c.txt").write_text("a cat\n\n  a dog \n" + "x\n" * 300, encoding="utf-8")
        assert captions(tmp_path / "c.txt")[:3] == ["a cat", "a dog", "x"]
        assert len(captions(tmp_path / "c.txt")) == 200
        (tmp_path / "e.txt").write_text("\n", encoding="utf-8")
        for name, says in (("e.txt", "has no captions"), ("none.txt", "cannot be read")):
            with pytest.raises(RequestError, match=says):
                captions(tmp_path / name)


def encoded(texts: list[str], words: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the features of each text's tokens 1 to the end's, by diffusers' own pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_single_file(
        str(MODEL), config=str(TINY / "config"), local_files_only=True
    )
    pipeline.text_encoder.float()
    for word, tensor in words.items():
        pipeline.load_textual_inversion({word: tensor}, token=word)
    found = []
    for text in texts:
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        end = int((ids[0] == pipeline.tokenizer.eos_token_id).int().argmax())
        with torch.no_grad():
            found.append(pipeline.text_encoder(ids).last_hidden_state[0, 1 : end + 1].double())
    return found


def test_the_commands(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin", "delta", trained(1), {"<new1>": vector(1)})
    done = CliRunner().invoke(
        root, ["compress-custom", str(path), "--base", str(MODEL), "--rank", "2", "-o", str(tmp_path / "c.bin")]
    )
    assert done.exit_code == 0
    wrong = CliRunner().invoke(
        root, ["merge-custom", str(path), f"{path}:", "--base", str(MODEL), "-o", str(tmp_path / "m.bin")]
    )
    assert wrong.exit_code == 2
    assert "names no class" in wrong.output

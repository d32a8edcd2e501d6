"""Textual inversion: what the word learns, what stays as it was, and what every reader makes of the file."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import concept, embedding_effects
from sdformats.embeddings import open_embedding
from sdformats.errors import FormatError
from sdformats.files import open_source
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.train import settings as groups
from sdmerge.train.batches import Batch
from sdmerge.train.data import DataProblems
from sdmerge.train.loading import load
from sdmerge.train.loop import Saving
from sdmerge.train.losses import schedule_of
from sdmerge.train.networks import Networks
from sdmerge.train.objective import Objective
from sdmerge.train.settings import LossSettings, ModelSettings
from sdmerge.train.text import TextEncoder
from sdmerge.train.textual_inversion import TextualInversion, keep_length
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

WORD = {"token": "<diamond>", "template": "captions", "init": "diamond"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = concept.diamonds(8, seed=1, token="<diamond>")
    return concept.write(drawn, tmp_path_factory.mktemp("data") / "words")


def test_a_word_learns_the_concept_and_nothing_else_changes(toy: Path, tmp_path: Path) -> None:
    found = embedding_effects.textual_inversion(toy, tmp_path, 0, steps=STEPS)
    assert found["trained"] < LEAST * min(found["init word"], found["best word"])
    assert found["base data after"] == found["base data before"]


STEPS, LEAST = 80, 0.9


def test_diffusers_reads_it_and_has_the_same_loss(toy: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "learned_embeds.safetensors"
    run = runs.trained("textual-inversion", toy, pictures, output, steps=3, vectors=2, to="diffusers", **WORD)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(toy, safety_checker=None)
    pipe.load_textual_inversion(str(output))
    ours = concept.questions(run.networks, concept.diamonds(4, seed=99, token="<diamond>"), draws=1)[0]
    told = run.networks.read(ours.captions).context
    prompts = [pipe.maybe_convert_prompt(text, pipe.tokenizer) for text in ours.captions]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = pipe.text_encoder(ids)[0]
        torch.testing.assert_close(theirs, told, atol=1e-6, rtol=1e-5)
        noisy = run.objective.schedule.noisy(ours.latents, ours.noise, ours.when)
        loss = ((pipe.unet(noisy, ours.when, theirs).sample - ours.noise) ** 2).mean()
        assert float(run.objective.denoising(ours)) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("word.pt", None),
        ("word.safetensors", None),
        ("word.bin", None),
        ("word.png", None),
        ("word.safetensors", "diffusers"),
        ("word.pt", "hcp"),
    ],
)
def test_every_layout_holds_what_was_trained(
    name: str, to: str | None, toy: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    run = runs.trained("textual-inversion", toy, pictures, output, steps=2, vectors=2, export_every=1, to=to, **WORD)
    paths = (output, output.with_name(f"word-000001{output.suffix}"))
    for path, step in zip(paths, (2, 1), strict=True):
        with open_source(path) as source:
            embedding, _ = open_embedding(source)
            found = value(embedding.words[0].vectors["clip_l"])
            assert torch.equal(found, run.trained.parameters["te1"]) == (step == 2)
            if to is None and output.suffix in (".pt", ".png", ".safetensors"):
                assert (embedding.name, embedding.step, embedding.checkpoint) == ("diamond", step, toy.name)


def test_the_file_names_the_model_by_its_hash(pictures: Path, tmp_path: Path) -> None:
    import hashlib

    model = tmp_path / "model.safetensors"
    shutil.copy(concept.TINY / "tiny-base.safetensors", model)
    output = tmp_path / "word.pt"
    given = {"model_config": str(concept.TINY / "config")} | WORD
    runs.trained("textual-inversion", model, pictures, output, steps=1, **given)
    held: dict[str, Any] = torch.load(output, weights_only=True)
    assert held["sd_checkpoint"] == hashlib.sha256(model.read_bytes()).hexdigest()[:10]
    assert (held["sd_checkpoint_name"], held["step"], held["name"]) == ("model", 1, "diamond")
    assert held["string_to_param"]["*"].shape == (1, 48)


def test_what_cannot_be_written_is_told_before_the_first_step(toy: Path, pictures: Path, tmp_path: Path) -> None:
    for values, kind, said in (
        ({"to": "nowhere"}, RequestError, "no layout"),
        ({"to": "bundle-of"}, RequestError, "no layout"),
        ({"token": "red"}, RequestError, "vocabulary already"),
        ({"token": " "}, RequestError, "the new word is empty"),
        ({"to": "nowhere"}, RequestError, "expected one of a1111"),
        ({"init": "red heart"}, RequestError, "tokens long"),
    ):
        with pytest.raises((kind, FormatError), match=said):
            runs.trained("textual-inversion", toy, pictures, tmp_path / "o.pt", steps=1, **WORD | values)
    assert list(tmp_path.iterdir()) == []


def test_captions_without_the_word_are_named_before_the_first_step(toy: Path, pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    first, second, *_ = sorted(data.glob("*.txt"))
    for file in (first, second):
        file.write_text("a large ring", encoding="utf-8")
    with pytest.raises(DataProblems) as caught:
        runs.trained("textual-inversion", toy, data, tmp_path / "o.pt", steps=1, **WORD)
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        str(file.with_suffix(".png")) for file in (first, second)
    ]
    assert "lacks the word" in caught.value.problems[0]
    runs.trained("textual-inversion", toy, data, tmp_path / "o.pt", steps=1, **WORD | {"template": "object"})


@pytest.mark.parametrize(("norm", "low", "high"), [("fixed", 1, 1), ("free", 0, 9), ("decay", 0, 9)])
def test_lengths(norm: str, low: float, high: float, toy: Path, pictures: Path, tmp_path: Path) -> None:
    given = WORD | {"init": "<random>", "norm": norm}
    run = runs.new("textual-inversion", toy, pictures, tmp_path / "o.pt", steps=3, **given)
    run.prepare()
    before = run.trained.parameters["te1"].detach().norm()
    run.loop(None)
    ratio = float(run.trained.parameters["te1"].detach().norm() / before)
    assert low - 1e-6 <= ratio <= high + 1e-6
    assert (abs(ratio - 1) < 1e-6) == (norm == "fixed")
    assert run.method.figures(run.trained) == {"norm": pytest.approx(float(before) * ratio, abs=1e-4)}


def test_a_length_is_gone_toward_in_parts() -> None:
    vectors = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    keep_length(vectors, torch.tensor([[1.0], [1.0]]), 0.5)
    torch.testing.assert_close(vectors.detach(), torch.tensor([[1.8, 2.4], [0.0, 0.0]]))


def test_both_encoders_of_sdxl_get_vectors(toy: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    one = load(ModelSettings(model=str(toy)))
    sizes: dict[str, Any] = {"intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(one.texts[0].tokenizer), "projection_dim": 8}
    texts = []
    for width, kind in ((12, CLIPTextModel), (16, CLIPTextModelWithProjection)):
        model: Any = kind(CLIPTextConfig(hidden_size=width, **sizes))
        texts.append(TextEncoder(model, copy.deepcopy(one.texts[0].tokenizer)))
    make: Any = UNet2DConditionModel
    unet = make(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=28,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    networks = Networks("sdxl", unet, one.vae, tuple(texts), one.scheduler)
    networks.freeze()
    output = tmp_path / "word.safetensors"
    given = {"token": "<diamond>", "vectors": 3, "model": str(toy), "data": "unused", "output": str(output)}
    method = groups.made(TextualInversion, given)
    settings = groups.Settings(**{name: groups.made(cls, given) for name, cls in groups.GROUPS.items()})
    trained = method.attach(networks, settings)
    objective = Objective(networks, schedule_of(one.scheduler, LossSettings(), "auto"), reads_texts=True)
    batch = Batch(
        torch.randn(1, 4, 8, 8), ("a <diamond>",), torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.zeros(1, 6)
    )
    objective.denoising(batch).backward()  # type: ignore[no-untyped-call]
    for parameter in trained.parameters.values():
        assert parameter.grad is not None
        assert (parameter.grad.abs().sum(1) > 0).all()
    method.save(trained, networks, settings, Saving(output, 7, 1))
    held = load_file(output)
    assert torch.equal(held["clip_l"], trained.parameters["te1"])
    assert torch.equal(held["clip_g"], trained.parameters["te2"])
    with pytest.raises(FormatError, match="has no place"):
        replace(method, to="a1111").save(trained, networks, settings, Saving(tmp_path / "word.pt", 7, 1, dry_run=True))

"""What conversions write, as torch, safetensors, diffusers and PIL read it; what is refused, and what is told."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdformats.adapters.errors import CannotHold
from sdformats.errors import OutputExists, WriteError
from sdmerge import convert
from sdmerge.errors import FamilyError, RequestError
from sdmerge.inspection import inspect_path
from tests.sdmerge.embedding import samples

if TYPE_CHECKING:
    from torch import Tensor

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "config" / "tokenizer"


def same(one: Tensor, other: Tensor) -> bool:
    return samples.bits(one) == samples.bits(other)


def sample(
    folder: Path, layout: str = "a1111", encoders: str = "clip_l", count: int = 2
) -> tuple[Path, dict[str, Tensor]]:
    given = samples.vectors(encoders, count)
    return samples.put(layout, folder, given), given


@pytest.mark.parametrize(
    ("ending", "encoders", "keys"),
    [
        (".safetensors", "clip_l", ["emb_params"]),
        (".safetensors", "clip_l clip_g", ["clip_g", "clip_l"]),
        (".pt", "clip_l", ["string_to_param/*"]),
        (".pt", "clip_l clip_g", ["clip_g", "clip_l"]),
        (".bin", "clip_l", ["cat"]),
        ("", "clip_l clip_g", ["learned_embeds.safetensors/cat", "learned_embeds_2.safetensors/cat"]),
    ],
)
def test_the_usual_layout_for_an_ending(tmp_path: Path, ending: str, encoders: str, keys: list[str]) -> None:
    path, given = sample(tmp_path / "in", "kohya", encoders)
    out = tmp_path / f"out{ending}"
    convert(path, out)
    found = samples.loaded(out)
    assert sorted(found) == keys
    assert all(any(same(tensor, one) for one in given.values()) for tensor in found.values())


def test_what_a1111_gets(tmp_path: Path) -> None:
    path, given = sample(tmp_path, "ai-toolkit")
    convert(path, tmp_path / "o.pt", to="a1111")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same(found.pop("string_to_param")["*"], given["clip_l"])
    expected = {"string_to_token": {"*": 265}, **samples.TEXTS, "software": '{"name": "ai-toolkit"}'}
    assert found == expected


def test_what_ai_toolkit_gets(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    convert(path, tmp_path / "o.safetensors", to="ai-toolkit")
    texts = samples.texts_of(tmp_path / "o.safetensors")
    assert json.loads(texts["string_to_param"]) == {"*": "emb_params"}
    assert {key: json.loads(texts[key]) for key in samples.TEXTS} == samples.TEXTS


def test_texts_travel_and_what_has_no_place_is_told(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    convert(path, tmp_path / "o.safetensors")
    texts = samples.texts_of(tmp_path / "o.safetensors")
    assert {key: texts[key] for key in samples.TEXTS} == {key: str(value) for key, value in samples.TEXTS.items()}
    report = convert(tmp_path / "o.safetensors", tmp_path / "o.bin")
    assert any("no place for texts there: name, step" in note for note in report.notes)
    convert(tmp_path / "o.safetensors", tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 321


def test_words_are_called(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    report = convert(path, tmp_path / "o.bin")
    assert any("called cat, after the file" in note for note in report.notes)
    assert list(samples.loaded(tmp_path / "o.bin")) == ["cat"]
    convert(path, tmp_path / "p.bin", token="<dog>")
    assert list(samples.loaded(tmp_path / "p.bin")) == ["<dog>"]
    report = convert(tmp_path / "p.bin", tmp_path / "q.pt")
    assert any("what the file is called, q; it was <dog>" in note for note in report.notes)
    assert torch.load(tmp_path / "q.pt", weights_only=True)["name"] == "dog"
    convert(path, tmp_path / "r.bin", token="t5")
    assert list(samples.loaded(tmp_path / "r.bin")) == ["<t5>"]


@pytest.mark.parametrize("encoders", ["clip_l", "open_clip", "clip_l clip_g"])
def test_pictures(tmp_path: Path, encoders: str) -> None:
    path, given = sample(tmp_path, "kohya", encoders)
    convert(path, tmp_path / "o.png", to="png")
    with Image.open(tmp_path / "o.png") as picture:
        tree = json.loads(base64.b64decode(picture.text["sd-ti-embedding"]))  # type: ignore[attr-defined]
        assert picture.size[1] == 512
    inside = tree["string_to_param"] if len(given) == 1 else tree
    for name, tensor in given.items():
        numbers = np.array(inside["*" if len(given) == 1 else name]["TORCHTENSOR"]).astype(np.float32)
        assert numbers.tobytes() == tensor.numpy().tobytes()


def test_a_picture_of_ones_own(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    Image.new("L", (300, 200), 99).save(tmp_path / "mine.jpg")
    convert(path, tmp_path / "o.png", preview=tmp_path / "mine.jpg")
    with Image.open(tmp_path / "o.png") as picture:
        pixels = np.asarray(picture)
        assert pixels.shape[0] == 200
        assert (abs(pixels[100].astype(int) - 99) < 3).all(axis=1).sum() == 300
    (tmp_path / "mine.jpg").write_bytes(b"no picture")
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        convert(path, tmp_path / "p.png", preview=tmp_path / "mine.jpg")
    assert not (tmp_path / "p.png").exists()


def test_the_type_can_be_changed(tmp_path: Path) -> None:
    path, given = sample(tmp_path)
    convert(path, tmp_path / "o.safetensors", dtype="bf16")
    assert same(samples.loaded(tmp_path / "o.safetensors")["emb_params"], given["clip_l"].bfloat16())
    save_file({"emb_params": torch.ones(1, 768, dtype=torch.float64)}, tmp_path / "d.safetensors")
    with pytest.raises(WriteError, match="F64"):
        convert(tmp_path / "d.safetensors", tmp_path / "o.png")
    convert(tmp_path / "d.safetensors", tmp_path / "o.png", dtype="fp32")


def test_one_encoder_is_not_the_other(tmp_path: Path) -> None:
    path, _ = sample(tmp_path, "kohya", "clip_l clip_g")
    with pytest.raises(
        CannotHold, match=r"clip_l and clip_g.*a1111 has no place; these layouts hold all of it: diffusers-pair"
    ):
        convert(path, tmp_path / "o.pt", to="a1111")


@pytest.mark.parametrize(
    ("encoders", "family", "fits"),
    [
        ("clip_l", "sd1", True),
        ("clip_l", "sdxl", False),
        ("clip_l", "sd2", False),
        ("open_clip", "sd2", True),
        ("clip_l clip_g", "sdxl", True),
        ("clip_l clip_g", "sd1", False),
        ("clip_l t5", "flux", True),
        ("clip_l clip_g t5", "sd3", True),
    ],
)
def test_for_a_family(tmp_path: Path, encoders: str, family: str, fits: bool) -> None:
    path, _ = sample(tmp_path, "kohya", encoders)
    if fits:
        convert(path, tmp_path / "o.safetensors", for_family=family)
        return
    with pytest.raises(FamilyError, match=f"not for {family}"):
        convert(path, tmp_path / "o.safetensors", for_family=family)
    assert not (tmp_path / "o.safetensors").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    for match, out, options in (
        ("no layout of embeddings.*did you mean 'kohya'", "o.safetensors", {"to": "koyha"}),
        ("no embedding ends so", "o.zip", {}),
        ("is not written into such a file", "o.safetensors", {"to": "a1111"}),
        ("a picture is wanted", "o.safetensors", {"to": "png"}),
        ("no embeddings for 'sd9'", "o.safetensors", {"for_family": "sd9"}),
    ):
        with pytest.raises(RequestError, match=match):
            convert(path, tmp_path / out, **options)  # type: ignore[arg-type]
    for read_only in ("original", "pairs", "pti", "bare"):
        with pytest.raises(CannotHold, match="is only read"):
            convert(path, tmp_path / "o.pt", to=read_only)
    (tmp_path / "o.pt").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        convert(path, tmp_path / "o.pt")
    with pytest.raises(RequestError, match="--base is not for such files"):
        convert(path, tmp_path / "x.pt", base=path)


def test_two_readings_are_decided_by_as(tmp_path: Path) -> None:
    torch.save(torch.ones(1, 768), tmp_path / "v.pt")
    with pytest.raises(RequestError, match=r"--as embedding\|aesthetic"):
        convert(tmp_path / "v.pt", tmp_path / "o.safetensors")
    convert(tmp_path / "v.pt", tmp_path / "o.safetensors", kind="embedding")
    assert list(samples.loaded(tmp_path / "o.safetensors")) == ["emb_params"]


def test_vectors_behind_the_text_encoder_are_not_lost_in_silence(tmp_path: Path) -> None:
    tensors = {"emp_params": torch.ones(2, 768), "emp_params_out": torch.zeros(1, 768)}
    save_file(tensors, tmp_path / "i.safetensors")
    with pytest.raises(CannotHold, match="behind the text encoder.*--allow-loss.*onetrainer"):
        convert(tmp_path / "i.safetensors", tmp_path / "o.pt")
    report = convert(tmp_path / "i.safetensors", tmp_path / "o.pt", allow_loss=True)
    assert any("behind a text encoder: clip_l_out" in note for note in report.notes)
    convert(tmp_path / "i.safetensors", tmp_path / "p.safetensors", to="onetrainer")
    assert sorted(samples.loaded(tmp_path / "p.safetensors")) == sorted(tensors)


def test_several_words(tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(1, 768), "<b>": torch.zeros(3, 768)}, tmp_path / "i.safetensors")
    with pytest.raises(CannotHold, match=r"2 words \(<a>, <b>\).*slice --word"):
        convert(tmp_path / "i.safetensors", tmp_path / "o.pt", to="a1111")
    convert(tmp_path / "i.safetensors", tmp_path / "o.safetensors")
    assert sorted(samples.loaded(tmp_path / "o.safetensors")) == ["<a>", "<b>"]
    with pytest.raises(RequestError, match="2 words, and --token names one"):
        convert(tmp_path / "i.safetensors", tmp_path / "p.safetensors", token="x")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path, _ = sample(tmp_path / "in")
    report = convert(path, tmp_path / "o.safetensors", dry_run=True)
    assert (report.written, report.tensors, report.family) == (False, 1, "sd1")
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


def test_vectors_in_memory_are_written(tmp_path: Path) -> None:
    """What a trainer has, which comes from no file."""
    from sdformats.embeddings.embedding import Embedding, Word
    from sdformats.tensor import DType, Spec
    from sdmerge.embedding.write import Wanted, write_embedding
    from sdmerge.lora.held import Held
    from sdmerge.options import Options
    from sdmerge.policy import Notes

    given = samples.vectors("clip_l", 3)["clip_l"]
    word = Word("<cat>", {"clip_l": Held(given, Spec((3, 768), DType.F16))})
    embedding = Embedding((word,), step=7, trainer="sdmerge")
    for name in ("o.pt", "o.safetensors", "o.png"):
        report = write_embedding(embedding, (), tmp_path / name, Wanted(), Options(), 0.0, Notes())
        assert report.written
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert same(found["string_to_param"]["*"], given.half())
    assert (found["name"], found["step"]) == ("cat", 7)
    assert inspect_path(tmp_path / "o.png")["details"]["words"][0]["vectors"] == {"clip_l": [3, 768]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TINY)


def encoder(width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    return CLIPTextModel(config)


@pytest.mark.parametrize(
    ("layout", "name"), [("diffusers", "o.safetensors"), ("diffusers", "o.bin"), ("a1111", "o.pt")]
)
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_loads_what_is_written(tmp_path: Path, tokenizer: Any, layout: str, name: str, count: int) -> None:
    """The words are in its tokenizer, and their vectors in the text encoder's table."""
    from copy import deepcopy

    from diffusers import StableDiffusionPipeline

    path, given = sample(tmp_path, "kohya", count=count)
    convert(path, tmp_path / name, to=layout, token="<mycat>")
    parts = {"vae": None, "unet": None, "scheduler": None, "safety_checker": None, "feature_extractor": None}
    pipeline: Any = StableDiffusionPipeline(
        **parts, text_encoder=encoder(768), tokenizer=deepcopy(tokenizer), requires_safety_checker=False
    )
    pipeline.load_textual_inversion(tmp_path, weight_name=name)
    word = "<mycat>" if layout == "diffusers" else "mycat"
    tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
    rows = pipeline.tokenizer.convert_tokens_to_ids(tokens)
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert same(table[rows].detach(), given["clip_l"])


def test_diffusers_loads_both_files_of_a_pair(tmp_path: Path, tokenizer: Any) -> None:
    from copy import deepcopy

    from diffusers import StableDiffusionXLPipeline

    path, given = sample(tmp_path, "kohya", "clip_l clip_g")
    convert(path, tmp_path / "pair", token="<mycat>")
    parts = {"vae": None, "unet": None, "scheduler": None}
    pipeline: Any = StableDiffusionXLPipeline(
        **parts, text_encoder=encoder(768), text_encoder_2=encoder(1280), tokenizer=deepcopy(tokenizer),
        tokenizer_2=deepcopy(tokenizer), add_watermarker=False,
    )  # fmt: skip
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        texts, table = getattr(pipeline, f"tokenizer{number}"), getattr(pipeline, f"text_encoder{number}")
        file = f"learned_embeds{number}.safetensors"
        pipeline.load_textual_inversion(tmp_path / "pair", weight_name=file, tokenizer=texts, text_encoder=table)
        rows = texts.convert_tokens_to_ids(["<mycat>", "<mycat>_1"])
        assert same(table.get_input_embeddings().weight[rows].detach(), given[name])


def test_inspect_knows_what_is_written(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    for layout, ending in (("a1111", ".pt"), ("a1111", ".png"), ("kohya", ".safetensors"), ("diffusers", ".bin")):
        out = tmp_path / f"{layout}-out{ending}"
        convert(path, out, to=layout)
        found = inspect_path(out)
        assert (found["kind"], found["layout"], found["family"]) == ("embedding", layout, "sd1")

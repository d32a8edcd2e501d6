"""Every layout of embeddings is read: encoders, words, names, trainers; and what is broken is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from sdformats.embeddings import LAYOUTS, open_embedding
from sdformats.errors import CorruptFile, FormatError, UnsafeFile
from sdformats.files import open_source
from sdformats.kinds import KINDS
from sdformats.layout import detect
from sdformats.views import bits as bits_of
from tests.sdmerge.embedding import samples

if TYPE_CHECKING:
    from pathlib import Path

CASES = [(layout, encoders) for layout, all_of in samples.ENCODERS.items() for encoders in all_of]
OWN_NAMES = {"a1111-inside": "original", "diffusers-bin": "diffusers", "png": "a1111"}
"""Layouts that are met in several containers."""
TRAINERS = {
    "a1111": "A1111's web UI",
    "original": "textual_inversion, the first program",
    "hcp": "HCP-Diffusion",
    "diffusers": "diffusers",
    "diffusers-pair": "diffusers",
    "kohya": "sd-scripts",
    "onetrainer": "OneTrainer",
    "ai-toolkit": "ai-toolkit",
    "pivotal": "cloneofsimo/lora",
    "bundle": None,
    "pairs": "XL-Textual-Inversion",
    "pti": "cog-sdxl",
    "bare": None,
}
WORDS = ("original", "diffusers", "diffusers-pair", "pivotal", "bundle", "pti")
FAMILIES = {
    "clip_l": "sd1", "open_clip": "sd2", "bert": None, "clip_g": "sdxl", "clip_l clip_g": "sdxl", "clip_l t5": "flux",
    "clip_l clip_g t5": "sd3",
}  # fmt: skip


@pytest.mark.parametrize(("layout", "encoders"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_is_read(tmp_path: Path, layout: str, encoders: str, dtype: torch.dtype) -> None:
    if layout == "png" and dtype is not torch.float32:
        pytest.skip("numbers in a picture are float32")
    count = 1 if layout in ("pivotal", "bare") else 3
    given = samples.vectors(encoders, count, dtype)
    path = samples.put(layout, tmp_path, given)
    with open_source(path) as source:
        kind = "embedding" if layout == "bare" else None
        seen = detect(source.specs, metadata=source.metadata, kind=kind)
        embedding, found = open_embedding(source)
        name = OWN_NAMES.get(layout, layout)
        if layout == "a1111-inside":
            name = "a1111"
        assert (seen.kind, seen.spelling, found.name) == ("embedding", name, name)
        assert embedding.trainer == TRAINERS[name]
        assert embedding.family == FAMILIES[encoders]
        (word,) = embedding.words
        assert word.token == ("<cat>" if name in WORDS else None)
        assert set(word.vectors) == set(given)
        for encoder, ref in word.vectors.items():
            assert ref.shape == given[encoder].shape
            assert bits_of(ref).tobytes() == samples.bits(given[encoder])[1]
    if name in ("a1111", "ai-toolkit"):
        assert (embedding.name, embedding.step) == ("inner", 321)
        assert (embedding.checkpoint_hash, embedding.checkpoint) == ("abcd1234", "model-v1")


def read(path: Path) -> samples.Any:
    with open_source(path) as source:
        return open_embedding(source)


def test_every_layout_has_a_sample_and_a_name() -> None:
    names = {OWN_NAMES.get(name, name) for name in samples.ENCODERS}
    assert {layout.name for layout in LAYOUTS} <= names | {"a1111"}
    for layout in LAYOUTS:
        assert layout.title
        assert layout.written_by
        assert layout.read_by
        assert bool(layout.containers) == (layout.write is not None) == (not layout.unwritten)
    assert [kind.layouts for kind in KINDS if kind.name == "embedding"] == [LAYOUTS]


def test_several_words(tmp_path: Path) -> None:
    inside = torch.nn.ParameterDict(
        {"*": torch.nn.Parameter(torch.ones(1, 768)), "a b": torch.nn.Parameter(torch.ones(2, 768))}
    )
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": inside}, tmp_path / "o.pt")
    embedding, layout = read(tmp_path / "o.pt")
    assert layout.name == "original"
    assert [(word.token, word.vectors["clip_l"].shape) for word in embedding.words] == [
        (None, (1, 768)),
        ("a b", (2, 768)),
    ]
    save_file({"<a>": torch.ones(768), "<b c>": torch.ones(3, 768)}, tmp_path / "d.safetensors")
    embedding, layout = read(tmp_path / "d.safetensors")
    assert layout.name == "diffusers"
    assert sorted(word.token for word in embedding.words) == ["<a>", "<b c>"]


def test_vectors_behind_the_text_encoder(tmp_path: Path) -> None:
    tensors = {"clip_l": torch.ones(2, 768), "clip_l_out": torch.ones(1, 768), "clip_g_out": torch.ones(1, 1280)}
    save_file(tensors, tmp_path / "o.safetensors")
    embedding, layout = read(tmp_path / "o.safetensors")
    (word,) = embedding.words
    assert (layout.name, set(word.vectors), set(word.outputs)) == ("onetrainer", {"clip_l"}, {"clip_l", "clip_g"})
    save_file({"emp_params": torch.ones(2, 1024), "emp_params_out": torch.ones(1, 1024)}, tmp_path / "o.safetensors")
    (word,) = read(tmp_path / "o.safetensors")[0].words
    assert (set(word.vectors), set(word.outputs)) == ({"open_clip"}, {"open_clip"})


def test_a_token_with_spaces(tmp_path: Path) -> None:
    torch.save({"my old cat": torch.ones(1, 768)}, tmp_path / "c.pt")
    embedding, layout = read(tmp_path / "c.pt")
    assert (layout.name, embedding.words[0].token) == ("diffusers", "my old cat")


def test_files_beside_are_told(tmp_path: Path) -> None:
    path = samples.put("a1111", tmp_path, samples.vectors("clip_l"))
    (tmp_path / "cat.pt.optim").write_bytes(b"x")
    assert "optim" in read(path)[0].notes[0]
    for number in ("", "_2"):
        save_file({"<a>": torch.ones(768)}, tmp_path / f"learned_embeds{number}-steps-500.safetensors")
    assert (
        "learned_embeds_2-steps-500.safetensors beside it"
        in read(tmp_path / "learned_embeds-steps-500.safetensors")[0].notes[0]
    )


def test_the_word_of_a_pti_is_beside_it(tmp_path: Path) -> None:
    path = samples.put("pti", tmp_path, samples.vectors("clip_l clip_g"), token="TOK")
    assert read(path)[0].words[0].token == "TOK"
    for text in ('{"TOK": "<s0>", "B": "<s1>"}', "[", '{"TOK": 3}', '{"TOK": "run me"}', "x" * 100_000):
        (tmp_path / "special_params.json").write_text(text)
        assert read(path)[0].words[0].token is None
    (tmp_path / "special_params.json").unlink()
    assert "special_params.json" in read(path)[0].notes[0]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"emb_params": torch.ones(0, 768)}, r"F32 \[0, 768\]"),
        ({"emb_params": torch.ones(1, 768), "clip_l": torch.ones(1, 768)}, "names of one text encoder and of several"),
        ({"bundle_emb.a.clip_x": torch.ones(1, 768)}, "names no text encoder"),
        ({"0.emb": torch.ones(768), "2.emb": torch.ones(768)}, "do not belong together"),
        ({"0.emb": torch.ones(768), "1.emb": torch.ones(1280)}, "do not belong together"),
        ({"0.emb": torch.ones(768), "1.emb": torch.ones(768), "0.emb2": torch.ones(1280)}, "do not belong together"),
        ({"1234567.emb": torch.ones(768)}, "no name of this layout"),
    ],
    ids=range(7),
)
def test_broken_embeddings_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], match: str) -> None:
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(CorruptFile, match=match):
        read(tmp_path / "b.safetensors")


def test_a_pair_whose_words_differ(tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(768)}, tmp_path / "learned_embeds.safetensors")
    save_file({"<b>": torch.ones(1280)}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(CorruptFile, match="in one of the two files alone"):
        read(tmp_path)


@pytest.mark.parametrize("tensors", [{"a": torch.ones(2, 3, 4)}, {f"x{i}": torch.ones(768) for i in range(3)}])
def test_what_is_no_embedding(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "n.safetensors")
    with pytest.raises(FormatError, match="no embedding in any known layout"):
        read(tmp_path / "n.safetensors")


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, ("touch owned",)


@pytest.mark.parametrize("place", ["beside", "inside", "under"])
def test_a_hostile_pt_is_refused_by_name_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = _Evil()
    trees = {
        "beside": {**samples.a1111(torch.ones(1, 768)), "notes": evil},
        "inside": {**samples.a1111(torch.ones(1, 768)), "string_to_param": {"*": evil}},
        "under": {"<cat>": torch.ones(768), evil: 1},
    }
    torch.save(trees[place], "e.pt")
    with pytest.raises(UnsafeFile, match=r"(posix|nt)\.system"):
        open_source(tmp_path / "e.pt")
    assert not (tmp_path / "owned").exists()

"""Every file that people made and shared is named right by `inspect`, or refused with a word that says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sdformats.errors import FormatError
from sdmerge import cli
from sdmerge.inspection import inspect_path

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
MANIFEST: list[dict[str, Any]] = json.loads((REAL / "manifest.json").read_text()) if REAL.is_dir() else []
A1111 = "A1111's web UI"
ORIGINAL = "textual_inversion, the first program"
ADAPTERS = {  # layout, family, modules, embeddings
    "002_attnproc-noprefix.safetensors": ("attn-procs", "sd1", 128, []),
    "006_attnproc-unetprefix.bin": ("diffusers-old", "sd1", 128, []),
    "009_attnproc-unetprefix-sd2.safetensors": ("diffusers-old", "sd2", 128, []),
    "015_2100-lora.safetensors": ("diffusers", "sd1", 128, []),
    "018_bf16.safetensors": ("diffusers", "sd2", 128, []),
    "019_sd21.safetensors": ("diffusers", "sd2", 128, []),
    "025_adapter_model.safetensors": ("peft", "sd1", 96, []),
    "029_te-adapter_model.safetensors": ("peft", "sd1", 24, []),
    "037_smart_falcon_4_lokr.safetensors": ("lycoris", "sd1", None, []),
    "038_analog_svd_rank4.safetensors": ("cloneofsimo", "sd1", 192, []),
    "040_lora_disney_inpainting.safetensors": ("cloneofsimo", "sd1", 192, ["<s1>", "<s2>"]),
}
EMBEDDINGS: dict[str, tuple[Any, ...]] = {  # layout, family, vectors, token, trainer, name inside, step, trained on
    "049_birb-style.bin": ("diffusers", "sd1", {"clip_l": [1, 768]}, "<birb-style>", "diffusers", None, None, None),
    "055_frida-10x768.bin": ("diffusers", "sd1", {"clip_l": [10, 768]}, "<frida>", "diffusers", None, None, None),
    "056_detail-schemas.safetensors": (
        "diffusers", "sd1", {"clip_l": [1, 768]}, "<detail-schemas>", "diffusers", None, None, None,
    ),
    "060_EasyNegativeV2.safetensors": ("kohya", "sd1", {"clip_l": [16, 768]}, None, None, None, None, None),
    "062_bad-artist-anime.pt": (
        "a1111", "sd1", {"clip_l": [2, 768]}, None, A1111, "bad-artist-2", 1850, "blossom-extract",
    ),
    "065_bad_prompt_version2.pt": (
        "a1111", "sd1", {"clip_l": [8, 768]}, None, A1111, "bad_prompt_version2", 12000, "Novel50WD50",
    ),
    "075_FastNegativeEmbedding.pt": (
        "a1111", "sd1", {"clip_l": [52, 768]}, None, A1111, "FastNegativeEmbedding_hand", None, None,
    ),
    "083_a1111-test_embedding.png": ("a1111", "sd1", {"clip_l": [8, 768]}, None, A1111, "rick", 60, None),
    "085_21CharTurnerV2_L-sd21.pt": (
        "a1111", "sd2", {"open_clip": [4, 1024]}, None, A1111, "21CharTurnerV2_L-420", 419, "2_base_v2-1_512-ema-pruned",
    ),
    "088_anya-parameterdict.pt": ("original", "sd1", {"clip_l": [1, 768]}, None, ORIGINAL, None, None, None),
    "091_unaestheticXLv31.safetensors": (
        "kohya", "sdxl", {"clip_l": [8, 768], "clip_g": [8, 1280]}, None, "sd-scripts", "unaestheticXLv31", None, None,
    ),
    "094_xl-emb-emb2-myPuppet768.pt": (
        "pairs", "sdxl", {"clip_l": [1, 768], "clip_g": [1, 1280]}, None, "XL-Textual-Inversion", None, None, None,
    ),
}  # fmt: skip
BARE = ("097_aivazovsky.pt", "099_laion_7plus.pt")
OTHERS = {
    "106_fooocus_inpaint_head.pth": ("inpaint-head", "sdxl", "Fooocus's inpaint head"),
    "120_a1111-empty.pt": ("other", None, "there is no tensor in it"),
}
REFUSED = {
    "026_adapter_config.json": "is JSON, not a model",
    "030_te-adapter_config.json": "is JSON, not a model",
    "118_lfs-pointer.safetensors": "is a git-lfs pointer",
    "119_two-byte.safetensors": "is only 2 bytes long",
    "122_keydump-shinkai_makoto_offset-sd1-kohya.json": "is JSON, not a model",
    "124_keydump-juggernautXLv9-unet.json": "is JSON, not a model",
}


def shown(name: str, *options: str) -> str:
    """Return what a person sees."""
    done = CliRunner().invoke(cli.root, ["inspect", str(REAL / name), *options], standalone_mode=False)
    assert done.exception is None
    return done.output


def test_the_tables_name_every_file() -> None:
    tables = (ADAPTERS, EMBEDDINGS, dict.fromkeys(BARE), OTHERS, REFUSED)
    assert sum(map(len, tables)) == len(MANIFEST)
    assert {name for table in tables for name in table} == {entry["file"] for entry in MANIFEST}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    layout, family, modules, words = ADAPTERS[name]
    found = inspect_path(REAL / name)
    assert (found["kind"], found["layout"], found["family"], found["embeddings"]) == ("adapter", layout, family, words)
    assert modules is None or found["modules"] == modules


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str) -> None:
    layout, family, vectors, token, trainer, inside, step, checkpoint = EMBEDDINGS[name]
    found = inspect_path(REAL / name)
    assert (found["kind"], found["layout"], found["family"], found["warnings"]) == ("embedding", layout, family, [])
    told = found["details"]
    (word,) = told["words"]
    assert (word["token"], word["vectors"], word["outputs"]) == (token, vectors, {})
    assert (told["trainer"], told["name"], told["step"], told["trained_on"]) == (trainer, inside, step, checkpoint)
    assert all(len(word["norms"][encoder]) == count for encoder, (count, _) in vectors.items())
    seen = shown(name)
    for text in (f"{family}: a textual-inversion embedding", f"{layout} layout", trainer or "unknown", token or "word"):
        assert text in seen


@pytest.mark.parametrize("name", BARE)
def test_what_could_be_two_things(name: str) -> None:
    found = inspect_path(REAL / name)
    assert (found["kind"], found["family"], found["readings"]) == ("ambiguous", "sd1", ["embedding", "aesthetic"])
    assert "--as embedding|aesthetic" in shown(name)
    for kind in found["readings"]:
        assert inspect_path(REAL / name, kind=kind)["kind"] == kind


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    kind, family, said = OTHERS[name]
    found = inspect_path(REAL / name)
    assert (found["kind"], found["family"]) == (kind, family)
    assert said in shown(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    assert REFUSED[name] in shown(name)
    with pytest.raises(FormatError, match=REFUSED[name]):
        inspect_path(REAL / name)

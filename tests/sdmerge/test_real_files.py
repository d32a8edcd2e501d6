"""Files that people made and shared: each is known for what it is, and read as torch and safetensors read it."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from sdformats.errors import FormatError, UnknownFormat
from sdformats.files import open_source
from sdformats.layout import detect
from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdformats.tensor import TensorSource

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")

MANIFEST: list[dict[str, Any]] = json.loads((REAL / "manifest.json").read_text()) if REAL.is_dir() else []
KINDS = {"lora": "adapter", "lycoris": "adapter", "ti": "embedding", "aesthetic": "ambiguous", "other": "other"}
OWN_KINDS = {"106_fooocus_inpaint_head.pth": "inpaint-head"}
FAMILIES = {"sd1-inpaint": "sd1"}
REFUSED: dict[str, tuple[type[FormatError], str]] = {
    "118_lfs-pointer.safetensors": (UnknownFormat, "git-lfs pointer"),
    "119_two-byte.safetensors": (UnknownFormat, "2 bytes"),
}
MODELS = [entry for entry in MANIFEST if entry["file"] not in REFUSED and not entry["file"].endswith(".json")]
PICKLES = [entry["file"] for entry in MODELS if not entry["file"].endswith(".safetensors")]
SAFETENSORS = [entry["file"] for entry in MODELS if entry["file"].endswith(".safetensors")]
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip


def name_of(entry: dict[str, Any]) -> str:
    return str(entry["file"])


@pytest.mark.parametrize("entry", MODELS, ids=name_of)
def test_its_kind_and_family(entry: dict[str, Any]) -> None:
    with open_source(REAL / entry["file"]) as source:
        found = detect(source.specs, metadata=source.metadata)
        assert found.kind == OWN_KINDS.get(entry["file"], KINDS[entry["kind"].split("-")[0]])
        if source.specs:
            assert found.family == FAMILIES.get(entry["base"], entry["base"])
        if entry["n_tensors"] is not None:
            assert len(source.specs) == entry["n_tensors"]


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str) -> None:
    kind, word = REFUSED[name]
    with pytest.raises(kind, match=word) as caught:
        open_source(REAL / name)
    assert caught.value.advice


@pytest.mark.parametrize("name", [entry["file"] for entry in MANIFEST if entry["file"].endswith(".json")])
def test_json_is_no_model(name: str) -> None:
    with pytest.raises(UnknownFormat, match="JSON"):
        open_source(REAL / name)


def test_every_file_is_in_one_of_these_tests() -> None:
    named = {entry["file"] for entry in MANIFEST}
    assert {path.name for path in REAL.iterdir()} - {"manifest.json"} == named
    assert set(REFUSED) <= named


def tensor(source: TensorSource, name: str) -> torch.Tensor:
    spec = source.specs[name]
    data = torch.frombuffer(source.read(name), dtype=DTYPES[spec.dtype.name]) if spec.numel else torch.empty(0)
    return data.reshape(spec.shape)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_it_reads_as_safetensors_reads_it(name: str) -> None:
    with open_source(REAL / name) as source, safe_open(REAL / name, framework="pt") as judge:
        assert set(source.specs) == set(judge.keys())
        assert dict(source.metadata) == (judge.metadata() or {})
        for key in source.specs:
            assert torch.equal(tensor(source, key), judge.get_tensor(key))


@cache
def judged(name: str) -> Any:
    """Return what torch loads, without running anything; None where it refuses."""
    import pickle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(REAL / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):
            return None


def inside(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from inside(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from inside(item)


@pytest.mark.parametrize("name", PICKLES)
def test_it_reads_as_torch_reads_it(name: str) -> None:
    judge = judged(name)
    if judge is None:
        pytest.skip("torch refuses it")
    expected = sorted((t.detach() for t in inside(judge)), key=_order)
    with open_source(REAL / name) as source:
        got = sorted((tensor(source, key) for key in source.specs), key=_order)
    assert len(got) == len(expected)
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == its.dtype
        assert torch.equal(mine, its)


def _order(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.double().flatten()[:4].tolist(), value.double().sum().item()


def test_torch_judges_most_of_the_pickles() -> None:
    assert sum(judged(name) is not None for name in PICKLES) >= len(PICKLES) // 2


def listed(name: str) -> dict[str, Spec]:
    """Return the specs of a published file of which only the list of keys is here."""
    return {key: Spec(tuple(value["shape"]), DType.F16) for key, value in json.loads((REAL / name).read_text()).items()}


def test_the_keys_of_an_sdxl_unet() -> None:
    found = detect(listed("124_keydump-juggernautXLv9-unet.json"))
    assert (found.kind, found.family, found.variant, found.spelling) == ("unet", "sdxl", "base", "diffusers")


def test_the_keys_of_a_kohya_lora() -> None:
    found = detect(listed("122_keydump-shinkai_makoto_offset-sd1-kohya.json"))
    assert (found.kind, found.family) == ("adapter", "sd1")

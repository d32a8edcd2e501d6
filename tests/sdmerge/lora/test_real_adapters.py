"""Adapters that people published: recognised, converted to every layout that can hold them, and back, with equal changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdformats.adapters import open_adapter
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layouts import LAYOUTS
from sdformats.adapters.records import LoRA
from sdformats.files import open_source
from sdmerge import api
from sdmerge.inspection import inspect_path
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from sdformats.adapters.record import Record
    from sdformats.views import Ref

REAL = Path(__file__).parents[4] / "shared" / "real"
MANIFEST = REAL / "manifest.json"
KINDS = {
    "lora-diffusers-old-attnprocs": ("attn-procs", "diffusers-old"),
    "lora-diffusers": ("diffusers",),
    "lora-peft": ("peft",),
    "lycoris-lokr": ("lycoris",),
    "lora-cloneofsimo": ("cloneofsimo",),
}
FAMILIES = {"sd1": "sd1", "sd1-inpaint": "sd1", "sd2": "sd2"}
WRITTEN = [layout.name for layout in LAYOUTS if layout.write is not None]

pytestmark = pytest.mark.skipif(not MANIFEST.exists(), reason="the published files are not here")


def entries() -> list[dict[str, Any]]:
    """Return what the manifest says about adapters, each with its config where it has one."""
    if not MANIFEST.exists():
        return []
    listed: list[dict[str, Any]] = json.loads(MANIFEST.read_text())
    found = []
    for entry, following in zip(listed, [*listed[1:], {}], strict=True):
        if entry["kind"] in KINDS and not entry["file"].endswith(".json"):
            config = following.get("note") == "config of previous"
            found.append(entry | {"config": following["file"] if config else None})
    return found


def identity(entry: dict[str, Any]) -> str:
    """Return a test's name."""
    return str(entry["file"])


def numbers(ref: Ref) -> torch.Tensor:
    """Return a tensor in float64."""
    return value(ref).double()


def same_factors(one: Record, other: Record) -> bool:
    """Whether two LoRAs have the same down, and the same up when each is multiplied with its scale."""
    assert isinstance(one, LoRA)
    assert isinstance(other, LoRA)
    ups = [(numbers(record.up) * record.scale).flatten(1) for record in (one, other)]
    downs = [numbers(record.down).flatten(1) for record in (one, other)]
    return torch.equal(*ups) and torch.equal(*downs)


def same_change(one: Record, other: Record) -> bool:
    """Whether two records change a weight by the same, within 1e-6."""
    changes = [delta(record, numbers).flatten(1) for record in (one, other)]
    return bool((changes[0] - changes[1]).norm() <= 1e-6 * changes[0].norm())


@pytest.mark.parametrize("entry", entries(), ids=identity)
def test_recognised_as_the_manifest_says(entry: dict[str, Any]) -> None:
    found = inspect_path(REAL / entry["file"])
    assert found["kind"] == "adapter"
    assert found["layout"] in KINDS[entry["kind"]]
    assert found["family"] == FAMILIES[entry["base"]]
    assert found["modules"] > 0
    assert found["ranks"]["min"] >= 1
    assert set(found["components"]) <= {"unet", "te1"}
    if entry["config"]:
        assert found["alphas"] is None
        assert any("adapter_config.json" in warning for warning in found["warnings"])


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("entry", entries(), ids=identity)
def test_there_and_back(entry: dict[str, Any], to: str, tmp_path: Path) -> None:
    there, back = tmp_path / ("there" if to == "peft" else "there.safetensors"), tmp_path / "back.safetensors"
    config = REAL / entry["config"] if entry["config"] else None
    exact = entry["kind"] != "lycoris-lokr"
    options: Any = {"adapter_config": config, "form": None if exact else "lora", "dtype": "keep" if exact else "fp32"}
    try:
        api.convert(REAL / entry["file"], there, to=to, **options)
    except CannotHold:
        assert not there.exists()
        return
    api.convert(there, back, to="lycoris")
    with open_source(REAL / entry["file"]) as source, open_source(back) as written:
        before, _ = open_adapter(source, config)
        after, _ = open_adapter(written)
        assert after.modules.keys() == before.modules.keys()
        # A Kronecker product is large: one module in twelve is enough of those.
        for path in list(before.modules)[:: 1 if exact else 12]:
            equal = same_factors if exact else same_change
            assert equal(before.modules[path], after.modules[path]), path


def test_most_layouts_hold_a_plain_lora(tmp_path: Path) -> None:
    entry = next(entry for entry in entries() if entry["kind"] == "lora-diffusers" and entry["base"] == "sd1")
    held = []
    for to in WRITTEN:
        target = tmp_path / (to if to == "peft" else f"{to}.safetensors")
        try:
            api.convert(REAL / entry["file"], target, to=to)
        except CannotHold:
            continue
        held.append(to)
    assert held == [
        *("kohya", "kohya-sgm", "lycoris", "lycoris-wrapper", "diffusers", "diffusers-old", "peft", "comfy"),
        "cloneofsimo",
    ]


@pytest.mark.parametrize("to", ["lycoris", "lycoris-wrapper", "comfy"])
def test_a_kronecker_product_stays_one_where_it_can(to: str, tmp_path: Path) -> None:
    entry = next(entry for entry in entries() if entry["kind"] == "lycoris-lokr")
    target = tmp_path / "out.safetensors"
    api.convert(REAL / entry["file"], target, to=to)
    with open_source(REAL / entry["file"]) as source, open_source(target) as written:
        before, _ = open_adapter(source)
        after, layout = open_adapter(written)
        assert layout.name == to
        for path, record in before.modules.items():
            other = dict(after.modules[path].refs)
            assert record.scale == after.modules[path].scale
            assert all(torch.equal(value(ref), value(other[name])) for name, ref in record.refs)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "cloneofsimo", "xlabs"])
def test_the_way_out_is_named(to: str, tmp_path: Path) -> None:
    entry = next(entry for entry in entries() if entry["kind"] == "lycoris-lokr")
    with pytest.raises(CannotHold, match="--as lora|these layouts hold all of it"):
        api.convert(REAL / entry["file"], tmp_path / "out.safetensors", to=to)


def test_peft_without_its_config_is_refused(tmp_path: Path) -> None:
    entry = next(entry for entry in entries() if entry["config"])
    with pytest.raises(CannotHold, match=r"adapter_config\.json.*--adapter-config FILE"):
        api.convert(REAL / entry["file"], tmp_path / "out.safetensors", to="kohya")
    assert not list(tmp_path.iterdir())


def test_kronecker_of_a_flattened_convolution() -> None:
    """The old LoKr file takes the product over the flattened kernel; the base's shape makes a convolution of it."""
    entry = next(entry for entry in entries() if entry["kind"] == "lycoris-lokr")
    with open_source(REAL / entry["file"]) as source:
        adapter, _ = open_adapter(source)
        record = adapter.modules["unet.down_blocks.0.resnets.0.conv1"]
        made = delta(record, value, shape=(320, 320, 3, 3))
        first, second = (value(getattr(record, f"w{n}_a")) @ value(getattr(record, f"w{n}_b")) for n in (1, 2))
    assert made.shape == (320, 320, 3, 3)
    expected = torch.einsum("ab,cd->acbd", first, second).reshape(320, 320, 3, 3) * record.scale
    assert torch.allclose(made, expected, rtol=1e-6, atol=0)


def test_words_come_along(tmp_path: Path) -> None:
    entry = next(entry for entry in entries() if "disney" in entry["file"])
    target = tmp_path / "out.safetensors"
    api.convert(REAL / entry["file"], target, to="kohya")
    with open_source(REAL / entry["file"]) as source, open_source(target) as written:
        before, _ = open_adapter(source)
        after, _ = open_adapter(written)
        assert list(after.embeddings) == ["<s1>", "<s2>"]
        for word, inner in before.embeddings.items():
            assert torch.equal(value(inner["*"]), value(after.embeddings[word]["*"]))

"""What a layout can hold is the same adapter after it is written and read again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.layouts import LAYOUTS, _slots
from sdformats.adapters.records import LoRA
from tests.formats.adapters.samples import opened
from tests.sdmerge.lora.adapters import (
    ALPHAS,
    MODULES,
    TYPES,
    Maker,
    adapters,
    allowed,
    check_close,
    check_same,
    same_tensor,
    write,
)

if TYPE_CHECKING:
    from sdformats.adapters.layout import AdapterLayout
    from sdformats.tensor import DType

BY_NAME = {layout.name: layout for layout in LAYOUTS}
WRITTEN = {
    "kohya": ("sd1", "sdxl"),
    "kohya-sgm": ("sd1", "sdxl"),
    "lycoris": ("sd1", "sdxl"),
    "lycoris-wrapper": ("sd1", "flux", "sd3"),
    "diffusers": ("sd1", "sdxl"),
    "diffusers-old": ("sd1", "sdxl"),
    "peft": ("sd1", "sdxl", "flux", "sd3"),
    "comfy": ("sd1", "sdxl"),
    "flux-diffusers": ("flux",),
    "sd3-diffusers": ("sd3",),
    "onetrainer": ("flux", "sd3"),
}
FUSED = {
    "flux-kohya": ("flux",),
    "xlabs": ("flux",),
    "sd3-kohya": ("sd3",),
    "comfy": ("flux", "sd3"),
    "lycoris": ("flux", "sd3"),
}


def cases(table: dict[str, tuple[str, ...]]) -> list[Any]:
    return [
        pytest.param(BY_NAME[name], family, id=f"{name}-{family}") for name, rest in table.items() for family in rest
    ]


def test_every_layout_that_writes_is_tried() -> None:
    assert {layout.name for layout in LAYOUTS if layout.write} == {*WRITTEN, *FUSED, "cloneofsimo"}


@pytest.mark.parametrize(("layout", "family"), cases(WRITTEN))
@settings(max_examples=20, derandomize=True, database=None)
@given(data=st.data())
def test_an_adapter_comes_back(layout: AdapterLayout, family: str, data: st.DataObject) -> None:
    adapter = data.draw(adapters(layout, family))
    with tempfile.TemporaryDirectory() as folder, opened(write(layout, adapter, Path(folder) / "a")) as (again, found):
        assert found is layout or layout.name == "lycoris"
        assert again.family == family
        assert set(again.modules) == set(adapter.modules)
        assert again.metadata == {"trained by": "someone"}
        for path, record in adapter.modules.items():
            if layout.alpha == "none" and record.scale != 1:
                check_close(record, again.modules[path])
                assert dict(record.refs)["down"].spec == dict(again.modules[path].refs)["down"].spec
            else:
                check_same(record, again.modules[path])
        assert {word: set(inner) for word, inner in again.embeddings.items()} == {
            word: set(inner) for word, inner in adapter.embeddings.items()
        }
        for word, inner in adapter.embeddings.items():
            assert all(same_tensor(ref, again.embeddings[word][key]) for key, ref in inner.items())


def group(path: str) -> str:
    """Return what is one module there, of those that are drawn here."""
    start, _, end = path.rpartition(".")
    if end in ("to_q", "to_k", "to_v", "proj_mlp"):
        return f"{start.removesuffix('.attn')} {'attn2' if 'attn2' in start else 'qkv'}"
    return f"{start} context" if end.startswith("add_") else path


@st.composite
def fused(draw: Any, layout: AdapterLayout, family: str) -> Adapter:
    """Draw LoRAs of which those of one module there have one down, or each its own, and are all there or not."""
    there = allowed(layout, family)
    dtype = draw(st.sampled_from(TYPES))
    maker = Maker(draw, dtype, draw(st.integers(0, 9)))
    paths = draw(st.lists(st.sampled_from(list(there)), unique=True, min_size=1))
    if draw(st.booleans()):
        paths = [path for path in there if group(path) in {group(chosen) for chosen in paths}]
    paths = [path for path in there if path in paths and len(there[path]) > 1]
    dense, one_alpha = draw(st.booleans()), draw(st.booleans())
    modules: dict[str, LoRA] = {}
    shared: dict[str, LoRA] = {}
    anchor = next(iter(there))
    for path in dict.fromkeys([anchor, *paths]):
        out, inner = there[path]
        rank = draw(st.integers(1, 4))
        record = LoRA(up=maker.ref(out, rank), down=maker.ref(rank, inner), alpha=draw(st.sampled_from(ALPHAS)))
        first = shared.setdefault(group(path), record)
        if dense:
            record = replace(record, up=maker.ref(out, first.rank), down=first.down)
        if one_alpha:
            record = replace(record, alpha=None if first.alpha is None else 2 * record.rank)
        modules[path] = record
    return Adapter(modules, family=family)


@pytest.mark.parametrize(("layout", "family"), cases(FUSED))
@settings(max_examples=30, derandomize=True, database=None)
@given(data=st.data())
def test_parts_of_fused_modules_come_back(layout: AdapterLayout, family: str, data: st.DataObject) -> None:
    adapter = data.draw(fused(layout, family))
    scales: dict[str, set[float]] = {}
    for path, record in adapter.modules.items():
        scales.setdefault(group(path), set()).add(record.scale)
    with tempfile.TemporaryDirectory() as folder, opened(write(layout, adapter, Path(folder))) as (again, _):
        assert again.family == family
        assert set(again.modules) == set(adapter.modules)
        for path, record in adapter.modules.items():
            check_close(record, again.modules[path])
            folded = layout.alpha == "none" and record.scale != 1
            if len(scales[group(path)]) == 1 and not folded:
                check_same(record, again.modules[path])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("components", [("unet",), ("te1",), ("unet", "te1")])
def test_numbered_factors_come_back(
    dtype: DType, alpha: float | None, components: tuple[str, ...], tmp_path: Path
) -> None:
    maker = Maker(None, dtype, 0)  # type: ignore[arg-type]
    modules: dict[str, LoRA] = {}
    if "unet" in components:
        for path in _slots.unet_modules(geglu=4):
            out, inner = 32 if "ff" in path else 4, 768 if path.endswith(("attn2.to_k", "attn2.to_v")) else 4
            modules[f"unet.{path}"] = LoRA(up=maker.ref(out, 2), down=maker.ref(2, inner), alpha=alpha)
    if "te1" in components:
        for path in _slots.text_modules(12):
            modules[f"te1.{path}"] = LoRA(up=maker.ref(768, 1), down=maker.ref(1, 768), alpha=alpha)
    adapter = Adapter(modules, {"<s1>": {"*": maker.ref(8)}}, {}, "sd1")
    with opened(write(BY_NAME["cloneofsimo"], adapter, tmp_path)) as (again, layout):
        assert (layout.name, again.family, list(again.embeddings)) == ("cloneofsimo", "sd1", ["<s1>"])
        assert set(again.modules) == set(modules)
        for path in list(modules) if alpha is None else list(modules)[::7]:
            check = check_same if alpha is None else check_close
            check(modules[path], again.modules[path])


def test_the_modules_that_are_drawn_have_names_in_every_layout_of_their_family() -> None:
    for name, families in WRITTEN.items():
        for family in families:
            missing = set(MODULES[family]) - set(allowed(BY_NAME[name], family))
            few = name in ("diffusers-old", "lycoris-wrapper")
            assert few or all(len(MODULES[family][path]) == 1 for path in missing), (name, missing)

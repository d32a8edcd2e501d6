"""What a layout has no place for is refused with names and a way out, or left out with a note: never in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.layouts import LAYOUTS
from sdmerge import conversion
from sdmerge.errors import RequestError
from sdmerge.options import Options
from tests.formats.adapters.samples import PEFT, WIDTHS, noise, numbered, opened, pair, save, save_peft

if TYPE_CHECKING:
    from pathlib import Path

    from sdmerge.execute import Report
    from tests.formats.adapters.samples import Tensors

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = "lora_unet_" + BLOCK.replace(".", "_")
ANCHOR = pair(f"{FLAT}_attn2_to_k", inner=WIDTHS["sd1"], alpha=1)
Q, K = f"{FLAT}_attn1_to_q", f"unet.{BLOCK}.attn2.to_k"
HADA = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}
FOLDERS = ("peft",)


def of(**shapes: tuple[int, ...]) -> Tensors:
    return ANCHOR | {f"{Q}.{name}": noise(*shape) for name, shape in shapes.items()}


LOKR = of(lokr_w1=(2, 2), lokr_w2=(2, 2))
DORA_IN = ANCHOR | pair(Q) | {f"{Q}.dora_scale": noise(1, 4)}
DORA_OUT = ANCHOR | pair(Q) | {f"{Q}.dora_scale": noise(4, 1)}
TUCKER = ANCHOR | {
    f"lora_unet_conv_in.lora_{name}.weight": noise(*shape)
    for name, shape in {"up": (4, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, 4, 1, 1)}.items()
}
NORM = ANCHOR | {"lora_unet_down_blocks_0_attentions_0_norm.w_norm": noise(4)}
WORD = ANCHOR | {"bundle_emb.word.string_to_param.*": noise(2, 4)}
CASES = [
    ("kohya", of(**HADA), "loha", "--as lora", f"unet.{BLOCK}.attn1.to_q"),
    ("kohya-sgm", LOKR, "lokr", "--as lora", f"unet.{BLOCK}.attn1.to_q"),
    ("diffusers", TUCKER, "tucker", "--as lora", "unet.conv_in"),
    ("peft", of(diff=(4, 4)), "full", "these layouts hold all of it", f"unet.{BLOCK}.attn1.to_q"),
    ("kohya", of(oft_blocks=(2, 2, 2)), "oft", "--as full with --base", f"unet.{BLOCK}.attn1.to_q"),
    ("kohya", DORA_OUT, "dora", "lycoris", f"unet.{BLOCK}.attn1.to_q"),
    ("diffusers", DORA_IN, "dora over columns", "lycoris", f"unet.{BLOCK}.attn1.to_q"),
    ("kohya", NORM, "norm", "lycoris", "unet.down_blocks.0.attentions.0.norm"),
    ("diffusers", WORD, "embeddings", "kohya", "word"),
    ("diffusers-old", ANCHOR | pair("lora_unet_conv_in", kernel=(3, 3)), "locon", "kohya", "unet.conv_in"),
    ("diffusers", ANCHOR | pair(Q) | {f"{Q}.diff_b": noise(4)}, "bias", "lycoris", f"unet.{BLOCK}.attn1.to_q"),
]


def convert(source: Path, target: Path, to: str, **more: Any) -> Report:
    return conversion.convert(source, target, conversion.Conversion(to=to, **more), Options())


def target_of(folder: Path, to: str) -> Path:
    return folder / "out" / ("b" if to in FOLDERS else "b.safetensors")


def refused(source: Path, to: str, tmp_path: Path, **more: Any) -> str:
    target = target_of(tmp_path, to)
    target.parent.mkdir()
    with pytest.raises(CannotHold) as caught:
        convert(source, target, to, **more)
    assert list(target.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("to", "tensors", "what", "way_out", "path"), CASES)
def test_what_a_layout_cannot_hold_is_refused(
    to: str, tensors: Tensors, what: str, way_out: str, path: str, tmp_path: Path
) -> None:
    text = refused(save(tmp_path / "a.safetensors", tensors), to, tmp_path)
    assert all(part in text for part in (what, way_out, path, to, "--allow-loss")), text


@pytest.mark.parametrize(("to", "tensors", "what", "way_out", "path"), CASES)
def test_it_is_left_out_where_that_is_allowed_and_noted(
    to: str, tensors: Tensors, what: str, way_out: str, path: str, tmp_path: Path
) -> None:
    target = target_of(tmp_path, to)
    target.parent.mkdir()
    report = convert(save(tmp_path / "a.safetensors", tensors), target, to, allow_loss=True)
    noted = [note for note in report.notes if "left out" in note]
    assert len(noted) == 1
    assert path in noted[0]
    assert what in noted[0]
    with opened(target) as (again, layout):
        assert (layout.name, list(again.modules), again.embeddings) == (to, [K], {})
        assert again.modules[K].scale == (1 if layout.alpha == "none" else 0.5)


def test_text_encoders_are_not_left_out_of_what_has_folders_for_them(tmp_path: Path) -> None:
    tensors = of(**HADA) | pair("lora_te_text_model_encoder_layers_0_mlp_fc1")
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "peft", allow_loss=True)
    with opened(tmp_path / "b") as (again, _):
        assert set(again.modules) == {K, "te1.text_model.encoder.layers.0.mlp.fc1"}


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS if layout.write is None])
def test_layouts_that_are_only_read_are_refused(layout: str, tmp_path: Path) -> None:
    text = refused(save(tmp_path / "a.safetensors", ANCHOR), layout, tmp_path)
    assert "only read" in text
    assert "--to" in text


@pytest.mark.parametrize("layout", ["flux-kohya", "sd3-kohya", "xlabs", "onetrainer"])
def test_a_layout_of_another_family_is_refused(layout: str, tmp_path: Path) -> None:
    text = refused(save(tmp_path / "a.safetensors", ANCHOR), layout, tmp_path)
    assert "is for sd1" in text
    assert "these layouts hold all of it: kohya" in text


def test_a_peft_file_without_its_settings_is_not_converted(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", pair(f"base_model.model.{BLOCK}.attn1.to_q", ends=PEFT))
    assert "--adapter-config" in refused(source, "kohya", tmp_path)
    config = save_peft(tmp_path / "other", {"x": noise(1)}, lora_alpha=1) / "adapter_config.json"
    convert(source, tmp_path / "b.safetensors", "kohya", adapter_config=config)
    with opened(tmp_path / "b.safetensors") as (again, _):
        assert [record.scale for record in again.modules.values()] == [0.5]


def test_a_mixture_of_dora_and_none_is_refused_where_there_is_one_switch(tmp_path: Path) -> None:
    text = refused(save(tmp_path / "a.safetensors", DORA_OUT), "peft", tmp_path)
    assert "DoRA" in text
    assert "attn2.to_k" in text


def test_numbers_are_for_all_attention_layers(tmp_path: Path) -> None:
    assert "attn1.to_q" in refused(save(tmp_path / "a.safetensors", ANCHOR), "cloneofsimo", tmp_path)


@pytest.mark.parametrize("allow_loss", [False, True])
def test_what_has_no_number_is_refused_with_a_way_out_that_helps(*, allow_loss: bool, tmp_path: Path) -> None:
    tensors = {
        f"unet:{n}:{x}": t for n, both in enumerate(numbered()) for x, t in zip(("up", "down"), both, strict=True)
    }
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", "kohya")
    with opened(tmp_path / "b.safetensors") as (again, _):
        assert len(again.modules) == 144
    more = load_file(tmp_path / "b.safetensors") | pair("lora_unet_down_blocks_0_attentions_0_proj_in")
    text = refused(save(tmp_path / "c.safetensors", more), "cloneofsimo", tmp_path, allow_loss=allow_loss)
    assert "down_blocks.0.attentions.0.proj_in" in text
    assert "--to" in text


@pytest.mark.parametrize("to", ["kohya", "peft", "diffusers"])
def test_nothing_is_written_where_nothing_is_left(to: str, tmp_path: Path) -> None:
    alone = {name: tensor for name, tensor in of(**HADA).items() if name not in ANCHOR}
    assert "nothing of it" in refused(save(tmp_path / "a.safetensors", alone), to, tmp_path, allow_loss=True)


def test_a_module_without_a_name_is_refused_or_left_out(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", ANCHOR | pair("lora_unet_down_blocks_0_attentions_0_proj_in"))
    text = refused(source, "diffusers-old", tmp_path)
    assert "unet.down_blocks.0.attentions.0.proj_in" in text
    report = convert(source, tmp_path / "b.safetensors", "diffusers-old", allow_loss=True)
    assert any("has no name" in note for note in report.notes)


def test_parts_of_several_types_are_refused_and_one_type_joins_them(tmp_path: Path) -> None:
    start = "transformer.single_transformer_blocks.0.attn.to_"
    tensors = {
        k: v.to(torch.bfloat16 if "to_q" in k else v.dtype)
        for x in "qkv"
        for k, v in pair(start + x, ends=PEFT).items()
    }
    source = save(tmp_path / "a.safetensors", tensors)
    text = refused(source, "flux-kohya", tmp_path)
    assert "--dtype" in text
    wanted = conversion.Conversion(to="flux-kohya")
    conversion.convert(source, tmp_path / "b.safetensors", wanted, Options(dtype="fp32"))
    with opened(tmp_path / "b.safetensors") as (again, _):
        assert len(again.modules) == 3


def test_a_layout_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", ANCHOR)
    with pytest.raises(RequestError, match="kohya"):
        convert(source, tmp_path / "b.safetensors", "kohja")


@pytest.mark.parametrize(("to", "name"), [("kohya", "b.pt"), ("peft", "b.safetensors")])
def test_outputs_are_called_what_they_are(to: str, name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", ANCHOR)
    with pytest.raises(RequestError, match="expected a name"):
        convert(source, tmp_path / name, to)
    assert not (tmp_path / name).exists()

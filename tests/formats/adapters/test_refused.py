"""What cannot be read is one line that names the file, what was seen, and where: nothing is left out in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from sdformats.errors import CorruptFile, UnsupportedFile
from tests.formats.adapters import samples
from tests.formats.adapters.samples import PEFT, noise, pair, refusal, save

if TYPE_CHECKING:
    from pathlib import Path

    from tests.formats.adapters.samples import Tensors

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_Q = "lora_unet_" + Q.replace(".", "_")
SGM_Q = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
DOWN, UP = samples.KOHYA
HADA = {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 4)}


def test_names_of_no_layout_are_shown(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.safetensors", {"model.layers.0.weight": noise(2), "head.weight": noise(2)}))
    assert "'model' (1)" in text
    assert "'head' (1)" in text
    assert "sdmerge layouts" in text


def test_a_file_without_tensors_is_no_adapter(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "a.safetensors")


def test_broken_factors_of_a_layout_of_its_own_are_named(tmp_path: Path) -> None:
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = {"lora_controlnet": noise(1), f"{name}.up": noise(4, 3), f"{name}.down": noise(2, 4)}
    text = refusal(save(tmp_path / "a.safetensors", tensors), CorruptFile)
    assert f"a.safetensors: {name!r}: has factors that do not fit" in text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pair(KOHYA_Q), pair(SGM_Q)),
        (pair(KOHYA_Q), pair(f"unet.{Q}", ends=PEFT)),
        (pair(KOHYA_Q), pair("lora_unet_double_blocks_0_img_attn_proj")),
        (pair(f"unet.{Q}", ends=PEFT), pair("transformer.single_transformer_blocks.0.proj_mlp", ends=PEFT)),
        (pair(f"{Q.rpartition('.')[0]}.processor.to_q_lora", ends=("down.weight", "up.weight")), pair(KOHYA_Q)),
        (pair(f"base_model.model.{Q}", ends=PEFT), pair(KOHYA_Q)),
        (pair("lycoris_" + Q.replace(".", "_")), pair(f"oft_unet_{Q.replace('.', '_')}")),
    ],
)
@pytest.mark.parametrize("more", [0, 1])
def test_two_layouts_in_one_file_are_an_error(one: Tensors, other: Tensors, more: int, tmp_path: Path) -> None:
    extra = {} if not more else {name.replace("attn1", "attn2"): tensor for name, tensor in one.items()}
    text = refusal(save(tmp_path / "a.safetensors", one | other | extra))
    assert any(name.split(".")[0].split("_")[0] in text for name in other)


@pytest.mark.parametrize(
    "name",
    [
        f"{KOHYA_Q}.lora_left.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q.lora_up.weight",
        "lora_te_text_model_encoder_layers_99_mlp_fc1.lora_up.weight",
        "lora_unet_down_blocks_00_resnets_0_conv1.lora_up.weight",
        "something",
    ],
)
def test_a_name_without_a_place_is_an_error_that_says_it(name: str, tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.safetensors", pair(KOHYA_Q) | {name: noise(4, 2)}), UnsupportedFile)
    assert repr(name) in text
    assert "kohya" in text


def test_how_many_names_have_no_place_is_told(tmp_path: Path) -> None:
    tensors = pair(KOHYA_Q) | {f"odd.{n}": noise(2) for n in range(3)}
    assert "nor are 2 more" in refusal(save(tmp_path / "a.safetensors", tensors), UnsupportedFile)


def end(**shapes: tuple[int, ...]) -> Tensors:
    return {f"{KOHYA_Q}.{name.replace('__', '.')}": noise(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (end(lora_up__weight=(4, 2)), "has no lora_down.weight"),
        (end(lora_down__weight=(2, 4)), "has no lora_up.weight"),
        (end(lora_up__weight=(4, 3), lora_down__weight=(2, 4)), "do not fit"),
        (end(lora_up__weight=(4,), lora_down__weight=(2, 4)), "do not fit"),
        (
            end(lora_up__weight=(4, 2, 1, 1), lora_down__weight=(2, 4, 1, 1), lora_mid__weight=(3, 2, 3, 3)),
            "do not fit",
        ),
        ({k: v for k, v in end(**{f"hada_{n}": s for n, s in HADA.items()}).items() if "w2_a" not in k}, "hada_w2_a"),
        (end(**{f"hada_{n}": s for n, s in (HADA | {"w2_b": (3, 4)}).items()}), "do not fit"),
        (end(lokr_w1=(2, 2)), "one factor of a Kronecker product"),
        (end(lokr_w1=(2, 2), lokr_w2_a=(2, 2)), "one factor of a Kronecker product"),
        (end(lokr_w1=(2, 2), lokr_w2_a=(2, 3), lokr_w2_b=(2, 2)), "do not fit"),
        (end(lokr_w1=(2, 2), lokr_w2=(2, 2), lokr_t1=(2, 2, 3, 3)), "lokr_t1"),
        (end(weight=(4,)), "has no on_input"),
        (end(oft_blocks=(2, 2, 2), diff=(4, 4)), "two algorithms"),
        (end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), diff=(4, 4)), "two algorithms"),
        (end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), dora_scale=(4,)), "dora_scale"),
        (end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), dora_scale=(2, 2)), "dora_scale"),
        (end(rescale=(4, 1)), "has no oft_blocks"),
        (end(b_norm=(4,)), "b_norm"),
        (end(alpha=(1,)), "has alpha, and nothing that it is for"),
        (end(dora_scale=(4, 1)), "has dora_scale, and nothing that it is for"),
        (end(lora_up__weight=(4, 0), lora_down__weight=(0, 4)), "has a tensor of F16 [4, 0]"),
        (end(lora_up__weight=(4, 2, 3, 3), lora_down__weight=(2, 4, 3, 3)), "has a factor of F16 [4, 2, 3, 3]"),
        (end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), lora_mid__weight=(2, 2)), "has a core of F16 [2, 2]"),
        (
            end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), dora_scale=(5, 1)),
            "has lengths of F16 [5, 1] and 4 rows",
        ),
        (end(lora_up__weight=(4, 2), lora_down__weight=(2, 4), diff_b=(5,)), "has a bias of F16 [5] and 4 rows"),
        (end(**{f"hada_{n}": s for n, s in (HADA | {"w2_a": (5, 2)}).items()}), "do not fit"),
        (end(**{f"hada_{n}": s for n, s in (HADA | {"w2_b": (2, 9)}).items()}), "do not fit"),
        (end(**{f"hada_{n}": s for n, s in (HADA | {"t1": (2, 2, 3, 3)}).items()}), "one core of two"),
        (end(lokr_w1=(2, 2), lokr_w2=(2,)), "a matrix or a convolution"),
        (end(lokr_w1=(2, 2), lokr_t2=(2, 3, 3, 3), lokr_w2_a=(2, 4), lokr_w2_b=(2, 4)), "do not fit"),
        (end(oft_blocks=(4, 2)), "square matrices"),
        (end(oft_blocks=(2, 2, 3)), "square matrices"),
        (end(oft_blocks=(9, 4, 2, 2)), "9 stages of a butterfly for 8 rows"),
        (end(oft_blocks=(2, 2, 2), rescale=(3, 1)), "has factors of F16 [3, 1] and 4 rows"),
        (end(oft_diag=(4, 2)), "square matrices"),
        (end(weight=(4, 4), on_input=(1,)), "one for each channel"),
        (end(w_norm=(4,), b_norm=(5,)), "has a bias of F16 [5] and 4 rows"),
        (end(diff=(4, 4), diff_b=(5,)), "has a bias of F16 [5] and 4 rows"),
        (end(a1__weight=(9, 2), a2__weight=(2, 4), b1__weight=(4, 2), b2__weight=(2, 4)), "do not fit"),
        (end(**{f"{x}__weight": (2, 3) for x in ("a1", "a2", "b1", "b2")}), "do not fit"),
        (end(**{f"{x}__weight": (4, 2) for x in ("a1", "a2", "b1")}), "b2.weight"),
    ],
)
def test_tensors_that_do_not_belong_together_are_an_error(tensors: Tensors, expected: str, tmp_path: Path) -> None:
    whole = {
        name: tensor for name, tensor in pair(KOHYA_Q.replace("attn1", "attn2")).items() if "hada" not in str(tensors)
    }
    text = refusal(save(tmp_path / "a.safetensors", whole | tensors), CorruptFile)
    assert expected in text
    assert KOHYA_Q in text


def test_one_factor_of_a_number_is_an_error(tmp_path: Path) -> None:
    tensors = {f"unet:{n}:{x}": noise(4, 4) for n in range(2) for x in ("up", "down")}
    del tensors["unet:1:up"]
    assert "unet:1" in refusal(save(tmp_path / "a.safetensors", tensors), CorruptFile)


def test_numbers_of_no_known_selection_are_an_error(tmp_path: Path) -> None:
    tensors = {f"unet:{n}:{x}": noise(4, 4) for n in range(3) for x in ("up", "down")}
    assert "3 numbered pairs" in refusal(save(tmp_path / "a.safetensors", tensors), UnsupportedFile)


def test_a_number_that_is_missing_is_an_error(tmp_path: Path) -> None:
    tensors = {f"unet:{n}:{x}": noise(4, 4) for n in (0, 2) for x in ("up", "down")}
    assert "number 1" in refusal(save(tmp_path / "a.safetensors", tensors), CorruptFile)


def test_a_list_of_factors_that_do_not_fit_is_an_error(tmp_path: Path) -> None:
    text = refusal(samples.save_list(tmp_path / "a.pt", [(noise(4, 1), noise(2, 4))]), CorruptFile)
    assert "do not fit" in text


def test_a_list_of_numbers_alone_is_no_adapter(tmp_path: Path) -> None:
    torch.save([torch.zeros(3), torch.zeros(3)], tmp_path / "a.pt")
    assert "no adapter in any known layout" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("module", "rows"), [("lora_unet_double_blocks_0_img_attn_qkv", 10), ("lora_unet_single_blocks_0_linear1", 27)]
)
def test_rows_that_do_not_divide_are_an_error(module: str, rows: int, tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.safetensors", pair(module, out=rows)), CorruptFile)
    assert f"has {rows} rows" in text
    assert module in text


def test_an_odd_number_of_rows_has_no_halves(tmp_path: Path) -> None:
    module = "lora_unet_final_layer_adaLN_modulation_1"
    beside = pair("lora_unet_double_blocks_0_img_attn_proj")
    text = refusal(save(tmp_path / "a.safetensors", pair(module, out=7) | beside), CorruptFile)
    assert "halves" in text
    assert module in text


def test_one_module_in_two_dialects_is_an_error(tmp_path: Path) -> None:
    tensors = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1") | pair("lora_te1_encoder_layers_0_mlp_fc1")
    text = refusal(save(tmp_path / "a.safetensors", tensors | pair(SGM_Q)), CorruptFile)
    assert "te1.text_model.encoder.layers.0.mlp.fc1" in text
    assert "second time" in text


def test_two_tensors_for_one_role_are_an_error(tmp_path: Path) -> None:
    module = "diffusion_model.input_blocks.1.1.proj_in"
    text = refusal(save(tmp_path / "a.safetensors", pair(module) | pair(module, ends=PEFT)), CorruptFile)
    assert "two tensors for lora_down.weight" in text


@pytest.mark.parametrize("left", [0.2, 0.9])
def test_a_file_that_is_cut_off_is_an_error(left: float, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", pair(KOHYA_Q))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left)])
    assert path.name in refusal(path, CorruptFile)


def test_a_control_lora_with_one_factor_is_an_error(tmp_path: Path) -> None:
    tensors = {"lora_controlnet": torch.zeros(0), "input_blocks.1.1.proj_in.up": noise(4, 2)}
    assert "input_blocks.1.1.proj_in" in refusal(save(tmp_path / "a.safetensors", tensors), CorruptFile)

"""Baking: every algorithm, every spelling of a model, several adapters at once, with one rounding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdmerge
from sdformats.adapters import open_adapter
from sdformats.files import open_source
from sdmerge.errors import RequestError
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value
from sdmerge.lora.strength import parse_strength
from sdmerge.rules import parse_rules
from tests.sdmerge import toys
from tests.sdmerge.lora.lycoris_cases import CASES, made

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.views import Ref

Tensors = dict[str, Tensor]
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
MODEL_TO_Q = toys.UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV1 = "lora_unet_down_blocks_0_resnets_0_conv1"
MODEL_CONV1 = toys.UNET + "input_blocks.1.0.in_layers.2.weight"
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
MODEL_FC1 = toys.TE + "encoder.layers.0.mlp.fc1.weight"


def double(ref: Ref) -> Tensor:
    """Return a tensor in float64."""
    return value(ref).double()


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors that need not be contiguous."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata)
    return path


def lora(module: str, out: int, inner: int, *kernel: int, alpha: float | None = None, seed: int = 0) -> Tensors:
    """Return the tensors of a LoRA of rank 2."""
    source = torch.Generator().manual_seed(seed)
    ones = (1,) * len(kernel)
    found = {
        f"{module}.lora_up.weight": torch.randn(out, 2, *ones, generator=source),
        f"{module}.lora_down.weight": torch.randn(2, inner, *kernel, generator=source),
    }
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def product(tensors: Tensors, module: str) -> Tensor:
    """Return up times down, as a matrix, in float64."""
    up, down = (tensors[f"{module}.lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
    return up @ down


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_is_added_with_one_rounding(name: str, tmp_path: Path) -> None:
    _, layer, tensors = made(name)
    weight = layer.get_parameter("weight").detach().half()
    conv = weight.dim() == 4
    model = toys.toy(1) | {MODEL_CONV1 if conv else MODEL_TO_Q: weight}
    module = CONV1 if conv else TO_Q
    adapter = save(tmp_path / "l.safetensors", {f"{module}.{end}": tensor for end, tensor in tensors.items()})
    base = save(tmp_path / "a.safetensors", model)
    sdmerge.bake(base, [(adapter, 0.5)], output=tmp_path / "out.safetensors", family="sd1")
    found = load_file(tmp_path / "out.safetensors")
    with open_source(adapter) as source:
        record = next(iter(open_adapter(source)[0].modules.values()))
        expected = weight.double() + 0.5 * delta(record, double, weight.double())
    changed = found.pop(MODEL_CONV1 if conv else MODEL_TO_Q)
    assert torch.allclose(changed.double(), expected, rtol=2.0**-11, atol=2e-6)
    assert all(torch.equal(tensor, model[key]) for key, tensor in found.items())


def test_several_adapters_are_rounded_once(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1, torch.bfloat16)
    many = [lora(TO_Q, 8, 8, alpha=0.004, seed=seed) | lora(CONV1, 8, 8, 3, 3, seed=seed) for seed in range(8)]
    files = [save(tmp_path / f"l{seed}.safetensors", tensors) for seed, tensors in enumerate(many)]
    sdmerge.bake(base, [(file, 0.5) for file in files], output=tmp_path / "out.safetensors")
    before, after = toys.toy(1, torch.bfloat16), load_file(tmp_path / "out.safetensors")
    exact = before[MODEL_TO_Q].double() + sum(0.5 * 0.002 * product(one, TO_Q) for one in many)
    assert torch.equal(after[MODEL_TO_Q], exact.float().bfloat16())
    conv = before[MODEL_CONV1].double().flatten(1) + sum(0.5 * product(one, CONV1) for one in many)
    assert torch.allclose(after[MODEL_CONV1].double().flatten(1), conv, rtol=2.0**-8, atol=1e-6)


def test_strength_scales_the_change(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1, torch.float32)
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8, alpha=3.0))
    weight = toys.toy(1, torch.float32)[MODEL_TO_Q].double()
    for strength in (0.0, 1.0, -0.7, 2.5):
        output = tmp_path / f"out{strength}.safetensors"
        sdmerge.bake(base, [(adapter, strength)], output=output)
        change = load_file(output)[MODEL_TO_Q].double() - weight
        assert torch.allclose(change, strength * 1.5 * product(lora(TO_Q, 8, 8), TO_Q), rtol=1e-5, atol=1e-6)


def test_biases_norms_and_whole_differences(tmp_path: Path) -> None:
    model = toys.toy(1, torch.float32)
    norm, bias = toys.UNET + "out.0.weight", toys.UNET + "input_blocks.0.0.bias"
    adapter = save(
        tmp_path / "l.safetensors",
        {
            "lora_unet_conv_norm_out.w_norm": torch.full((8,), 2.0),
            "lora_unet_conv_in.diff": torch.ones(8, 4, 3, 3),
            "lora_unet_conv_in.diff_b": torch.full((8,), 4.0),
        },
    )
    base = save(tmp_path / "a.safetensors", model)
    sdmerge.bake(base, [(adapter, 0.5)], output=tmp_path / "out.safetensors", family="sd1")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found[norm], model[norm] + 1)
    assert torch.equal(found[toys.CONV_IN], model[toys.CONV_IN] + 0.5)
    assert torch.equal(found[bias], model[bias] + 2)


def test_strengths_by_part_and_block(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1, torch.float32)
    middle = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8) | lora(middle, 8, 8) | lora(FC1, 24, 6))
    strength = sdmerge.Weights(value=1.0, te=0.25, blocks={"M00": 0.5})
    sdmerge.bake(base, [(adapter, strength)], output=tmp_path / "out.safetensors")
    before, after = toys.toy(1, torch.float32), load_file(tmp_path / "out.safetensors")
    in_middle = toys.UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    for key, module, factor in ((MODEL_TO_Q, TO_Q, 1.0), (in_middle, middle, 0.5), (MODEL_FC1, FC1, 0.25)):
        change = (after[key] - before[key]).double()
        expected = factor * product(load_file(adapter), module)
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-6), key


def test_a_rule_that_fits_nothing_is_told(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8))
    rules = parse_rules(["*.attn1.to_q.*:0.5", "*.attn9.*:0.5", "IN01:attn1:0.2", "IN01:attn9:0.2"])
    weights = sdmerge.Weights(value=1.0, rules=rules)
    report = sdmerge.bake(base, [(adapter, weights)], output=tmp_path / "out.safetensors")
    said = [note for note in report.notes if "rule" in note]
    assert said == ["the rule *.attn9.*:0.5 fits no tensor", "the rule IN01:attn9:0.2 fits no tensor"]


def test_open_clip_has_q_k_and_v_in_one_and_its_projection_transposed(tmp_path: Path) -> None:
    te2 = "conditioner.embedders.1.model."
    block = te2 + "transformer.resblocks.0."
    model = {f"{te2}text_projection": torch.randn(6, 10), f"{block}attn.in_proj_weight": torch.randn(18, 6)}
    model |= {f"{block}attn.in_proj_bias": torch.randn(18), f"{block}mlp.c_fc.weight": torch.randn(24, 6)}
    layer = "lora_te2_text_model_encoder_layers_0_"
    names = {"q": layer + "self_attn_q_proj", "v": layer + "self_attn_v_proj", "fc1": layer + "mlp_fc1"}
    tensors = lora(names["q"], 6, 6, seed=1) | lora(names["v"], 6, 6, seed=2) | lora(names["fc1"], 24, 6, seed=3)
    projection = "lora_te2_text_projection"
    tensors |= lora(projection, 10, 6, seed=4) | {f"{names['v']}.diff_b": torch.ones(6)}
    base, adapter = save(tmp_path / "a.safetensors", model), save(tmp_path / "l.safetensors", tensors)
    sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", family="sdxl")
    found = load_file(tmp_path / "out.safetensors")
    change = {name: (found[name] - tensor).double() for name, tensor in model.items()}
    in_proj = change[f"{block}attn.in_proj_weight"]
    close: Any = {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(in_proj[:6], product(tensors, names["q"]), **close)
    assert not in_proj[6:12].any()
    assert torch.allclose(in_proj[12:], product(tensors, names["v"]), **close)
    assert torch.allclose(change[f"{te2}text_projection"], product(tensors, projection).T, **close)
    assert torch.allclose(change[f"{block}mlp.c_fc.weight"], product(tensors, names["fc1"]), **close)
    assert torch.allclose(change[f"{block}attn.in_proj_bias"][12:], torch.ones(6, dtype=torch.float64), **close)


def test_flux_has_fused_modules_and_swapped_halves(tmp_path: Path) -> None:
    flux = "model.diffusion_model."
    model = {
        f"{flux}double_blocks.0.img_attn.qkv.weight": torch.randn(12, 4),
        f"{flux}single_blocks.0.linear1.weight": torch.randn(28, 4),
        f"{flux}final_layer.adaLN_modulation.1.weight": torch.randn(8, 4),
    }
    ours = "transformer."
    modules = {
        "double_blocks.0.img_attn.qkv": f"{ours}transformer_blocks.0.attn.to_k",
        "single_blocks.0.linear1": f"{ours}single_transformer_blocks.0.proj_mlp",
        "final_layer.adaLN_modulation.1": f"{ours}norm_out.linear",
    }
    shapes = {"qkv": (4, 4), "linear1": (16, 4), "1": (8, 4)}
    tensors: Tensors = {}
    for theirs, module in modules.items():
        made_here = lora(module, *shapes[theirs.rpartition(".")[2]], seed=len(module))
        tensors |= {
            name.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): t for name, t in made_here.items()
        }
    base, adapter = save(tmp_path / "a.safetensors", model), save(tmp_path / "l.safetensors", tensors)
    sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", family="flux")
    found = load_file(tmp_path / "out.safetensors")
    rows = {"double_blocks.0.img_attn.qkv": (4, 8), "single_blocks.0.linear1": (12, 28)}
    for theirs, module in modules.items():
        name = f"{flux}{theirs}.weight"
        change = (found[name] - model[name]).double()
        expected = tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
        if theirs in rows:
            first, last = rows[theirs]
            assert torch.allclose(change[first:last], expected, rtol=1e-5, atol=1e-6)
            change[first:last] = 0
            assert not change.any()
        else:
            assert torch.allclose(change, torch.cat([expected[4:], expected[:4]]), rtol=1e-5, atol=1e-6)


def test_a_diffusers_folder_stays_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weight = torch.randn(8, 8)
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", {name: weight})
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8))
    sdmerge.bake(folder, [adapter], output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = weight.double() + product(load_file(adapter), TO_Q)
    assert torch.allclose(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_keeps_weak_adapters(tmp_path: Path) -> None:
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    base = save(tmp_path / "a.safetensors", toys.toy(1, torch.bfloat16) | {MODEL_TO_Q: weight})
    up, down = torch.full((64, 1), 1e-3), torch.ones(1, 64)
    adapter = save(tmp_path / "l.safetensors", {f"{TO_Q}.lora_up.weight": up, f"{TO_Q}.lora_down.weight": down})
    means = {}
    for seed in (None, 7):
        output = tmp_path / f"out{seed}.safetensors"
        sdmerge.bake(base, [adapter], output=output, stochastic_rounding=seed)
        means[seed] = (load_file(output)[MODEL_TO_Q].double() - 1).mean().item()
        assert sdmerge.verify(output).identical
    assert means[None] == 0
    assert means[7] == pytest.approx(1e-3, rel=0.2)


def test_a_recipe_bakes_and_merges_in_one_pass(tmp_path: Path) -> None:
    toys.saved(tmp_path, "a", 1)
    toys.saved(tmp_path, "b", 2)
    save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8) | lora(FC1, 24, 6))
    (tmp_path / "r.yaml").write_text(
        "models: {a: a.safetensors, b: b.safetensors, style: l.safetensors}\n"
        "merge:\n"
        "  method: weighted_sum\n"
        "  models: [{model: a, adapters: [{adapter: style, strength: {value: 0.5, te: 0}}]}, b]\n"
        "  parameters: {alpha: 0.25}\n"
        "output: out.safetensors\n"
    )
    sdmerge.run_recipe(tmp_path / "r.yaml")
    found = load_file(tmp_path / "out.safetensors")
    a, b = toys.toy(1), toys.toy(2)
    baked = a[MODEL_TO_Q].double() + 0.5 * product(load_file(tmp_path / "l.safetensors"), TO_Q)
    expected = 0.75 * baked + 0.25 * b[MODEL_TO_Q].double()
    assert torch.allclose(found[MODEL_TO_Q].double(), expected, rtol=2.0**-11, atol=1e-6)
    plain = (0.75 * a[MODEL_FC1].double() + 0.25 * b[MODEL_FC1].double()).half()
    assert torch.equal(found[MODEL_FC1], plain)
    assert sdmerge.verify(tmp_path / "out.safetensors").identical


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ("{model: a, adapters: []}", "adapters is no list"),
        ("{model: a, adapters: [{adapter: l, strength: much}]}", "strength is 'much'"),
        ("{model: a, adapters: [{adaptor: l}]}", "did you mean 'adapter'"),
        ("{model: {method: linear, models: [a]}, adapters: [l]}", "adapters belong to a model"),
        ("{model: a, adapters: [{adapter: a}]}", "is no adapter"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(merge: str, said: str, tmp_path: Path) -> None:
    toys.saved(tmp_path, "a", 1)
    save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8))
    (tmp_path / "r.yaml").write_text(
        f"models: {{a: a.safetensors, l: l.safetensors}}\nmerge: {merge}\noutput: o.safetensors\n"
    )
    with pytest.raises(Exception, match=said) as caught:
        sdmerge.run_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_words_are_written_beside_the_output(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    vectors = torch.randn(2, 768)
    adapter = save(tmp_path / "l.safetensors", lora(TO_Q, 8, 8) | {"bundle_emb.../my word.string_to_param.*": vectors})
    report = sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors")
    beside = [
        path.name for path in tmp_path.iterdir() if path.name.startswith("out.") and path.name != "out.safetensors"
    ]
    assert len(beside) == 1
    assert any(beside[0] in note for note in report.notes)
    assert torch.equal(load_file(tmp_path / beside[0])["emb_params"], vectors)


def test_no_adapter_and_no_scale_are_refused(tmp_path: Path) -> None:
    base = toys.saved(tmp_path, "a", 1)
    with pytest.raises(RequestError, match="no adapter"):
        sdmerge.bake(base, [], output=tmp_path / "out.safetensors")
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    peft = save(tmp_path / "peft.safetensors", tensors)
    with pytest.raises(RequestError, match=r"no known scale.*adapter_config\.json"):
        sdmerge.bake(base, [peft], output=tmp_path / "out.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    sdmerge.bake(base, [peft], output=tmp_path / "out.safetensors")


def test_strengths_are_told_from_paths(tmp_path: Path) -> None:
    odd = tmp_path / "l:2"
    odd.write_bytes(b"")
    assert parse_strength(str(odd)) == (odd, 1.0)
    assert parse_strength(f"{odd}:0.5") == (odd, 0.5)
    assert parse_strength("l.safetensors:-1e-1")[1] == -0.1
    assert str(parse_strength("c:l.safetensors")[0]) == "c:l.safetensors"
    assert parse_strength("l.safetensors:inf")[1] == 1.0


@pytest.mark.parametrize(("rows", "swaps"), [(8, True), (24, False)])
def test_the_last_context_norm_of_sd3_is_swapped(rows: int, swaps: bool, tmp_path: Path) -> None:
    name = "model.diffusion_model.joint_blocks.3.context_block.adaLN_modulation.1.weight"
    weight = torch.randn(rows, 4)
    module = "transformer.transformer_blocks.3.norm1_context.linear"
    factors = {f"{module}.lora_A.weight": torch.randn(1, 4), f"{module}.lora_B.weight": torch.randn(rows, 1)}
    base, adapter = save(tmp_path / "a.safetensors", {name: weight}), save(tmp_path / "l.safetensors", factors)
    sdmerge.bake(base, [adapter], output=tmp_path / "out.safetensors", family="sd3")
    change = load_file(tmp_path / "out.safetensors")[name] - weight
    expected = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    assert torch.allclose(change, expected.roll(rows // 2, 0) if swaps else expected, rtol=1e-5, atol=1e-6)

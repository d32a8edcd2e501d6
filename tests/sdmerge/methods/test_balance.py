"""Balanced attentions do what they did, in the modules of diffusers, transformers and torch, with even energies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdmerge
from sdmerge import demo
from sdmerge.attention import find, siblings
from sdmerge.errors import MismatchError, RequestError
from sdmerge.method import Place
from sdmerge.methods.balance import balance_attention

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("diffusers", reason="the extra `demo` is not installed")
transformers: Any = pytest.importorskip("transformers", reason="the extra `demo` is not installed")
processor: Any = pytest.importorskip("diffusers.models.attention_processor")
clip: Any = pytest.importorskip("transformers.models.clip.modeling_clip")
t5: Any = pytest.importorskip("transformers.models.t5.modeling_t5")

TINY = Path(__file__).parents[3] / "examples" / "tiny" / "tiny-base.safetensors"


def balanced(tensors: dict[str, Tensor], family: str | None = None, **values: Any) -> dict[str, Tensor]:
    """Balance a model's tensors as the plan does."""
    made = {}
    for name, x in tensors.items():
        others = siblings(name, tensors)
        beside = [{other: tensors[other] for other in others or ()}]
        made[name] = (
            x if others is None else balance_attention(x, beside=beside, place=Place(name, 0, family), **values)
        )
    return made


def attention(width: int, context: int, heads: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    module = processor.Attention(width, context, heads=heads, dim_head=width // heads)
    return module, lambda m: m(torch.linspace(-1, 1, 5 * width).reshape(1, 5, width).sin(), context_of(context))


def context_of(width: int) -> Tensor:
    return torch.linspace(-1, 1, 3 * width).reshape(1, 3, width).cos()


def in_a_vae() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    module = processor.Attention(32, heads=1, dim_head=32, bias=True, norm_num_groups=8, residual_connection=True)
    return module, lambda m: m(torch.linspace(-1, 1, 32 * 9).reshape(1, 32, 3, 3).sin())


def in_clip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = transformers.CLIPTextConfig(hidden_size=128, num_attention_heads=2, attn_implementation="eager")
    module = clip.CLIPAttention(config)
    return module, lambda m: m(context_of(128))[0]


def in_t5() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = transformers.T5Config(d_model=96, d_kv=64, num_heads=2)
    module = t5.T5Attention(config, has_relative_attention_bias=True)
    return module, lambda m: m(context_of(96))[0]


def in_open_clip() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    module = nn.MultiheadAttention(128, 2, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    return module, lambda m: m(context_of(128), context_of(128), context_of(128))[0]


UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
MODULES: dict[str, tuple[str, str, Callable[[], tuple[nn.Module, Any]]]] = {
    "sd1": ("sd1", UNET + "attn2.", lambda: attention(320, 768, 8)),
    "sdxl": ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.", lambda: attention(128, 128, 2)),
    "vae": ("sd1", "vae.decoder.mid_block.attentions.0.", in_a_vae),
    "clip": ("sd1", "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.", in_clip),
    "t5": ("flux", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.", in_t5),
    "openclip": ("sd2", "cond_stage_model.model.transformer.resblocks.0.attn.", in_open_clip),
}


@pytest.fixture(params=MODULES)
def example(request: pytest.FixtureRequest) -> tuple[str, str, nn.Module, Any]:
    torch.manual_seed(0)
    family, prefix, build = MODULES[request.param]
    module, run = build()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return family, prefix, module.double().eval(), lambda m: run(_In64(m))


class _In64:
    """Calls a module in float64."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            return self._module(*(x.double() for x in inputs))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_modules_do_the_same(example: tuple[str, str, nn.Module, Any], alpha: float) -> None:
    family, prefix, module, run = example
    before = run(module)
    tensors = {prefix + name: x for name, x in module.state_dict().items()}
    made = balanced(tensors, family, alpha=alpha)
    changed = {name for name, x in made.items() if (x - tensors[name]).abs().max() > 1e-3}
    assert len(changed) >= (2 if "in_proj_weight" in module.state_dict() else 4)
    assert not any(name.endswith(("out.0.bias", "out_proj.bias", "norm.weight")) for name in changed)
    module.load_state_dict({name.removeprefix(prefix): x for name, x in made.items()})
    torch.testing.assert_close(run(module), before, rtol=1e-8, atol=1e-8)


def energies(weights: list[Tensor], heads: int) -> list[Tensor]:
    return [(x := weight.unflatten(0, (heads, -1))) @ x.mT for weight in weights]


def test_half_way_is_a_balance_and_one_an_exchange() -> None:
    module, _ = attention(320, 768, 8)
    tensors = {UNET + "attn2." + name: x.double() for name, x in module.state_dict().items()}
    q, k, v, out = (UNET + f"attn2.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0"))
    for first, second in ((q, k), (v, out)):

        def rows(made: dict[str, Tensor], pair: tuple[str, str] = (first, second)) -> list[Tensor]:
            return [made[name].T if name == out else made[name] for name in pair]

        before = energies(rows(tensors), 8)
        even = energies(rows(balanced(tensors, "sd1")), 8)
        torch.testing.assert_close(even[0], even[1], rtol=1e-9, atol=1e-12)
        swapped = energies(rows(balanced(tensors, "sd1", alpha=1.0)), 8)
        torch.testing.assert_close(swapped[0], before[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(swapped[1], before[0], rtol=1e-9, atol=1e-12)


def test_balanced_attentions_stay() -> None:
    module, _ = attention(320, 768, 8)
    tensors = {UNET + "attn2." + name: x.double() for name, x in module.state_dict().items()}
    once = balanced(tensors, "sd1")
    for name, x in balanced(once, "sd1").items():
        torch.testing.assert_close(x, once[name], rtol=1e-9, atol=1e-9)
    for name, x in balanced(tensors, "sd1", alpha=0.0).items():
        assert torch.equal(x, tensors[name])


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v", "to_out.0"])
def test_a_dead_head_stays(part: str) -> None:
    """Queries, keys, values or output of one head that are all zero: nothing to balance with, and nothing infinite."""
    module, _ = attention(320, 768, 8)
    tensors = {UNET + "attn2." + name: x.double() for name, x in module.state_dict().items()}
    dead = tensors[UNET + f"attn2.{part}.weight"]
    (dead.T if part == "to_out.0" else dead)[40:80] = 0
    made = balanced(tensors, "sd1")
    for name, x in made.items():
        assert x.isfinite().all()
        if name.endswith("weight"):
            mine = (x.T, tensors[name].T) if "to_out" in name else (x, tensors[name])
            partner = ("to_q", "to_k") if part in ("to_q", "to_k") else ("to_v", "to_out")
            same = torch.allclose(mine[0][40:80], mine[1][40:80], rtol=0, atol=1e-12)
            assert same == any(one in name for one in partner)


def test_non_finite_weights_show() -> None:
    module, _ = attention(128, 128, 2)
    tensors = {UNET + "attn1." + name: x for name, x in module.state_dict().items()}
    tensors[UNET + "attn1.to_k.weight"][3, 3] = torch.inf
    assert balanced(tensors, "sdxl")[UNET + "attn1.to_q.weight"].isnan().any()


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "transformer.transformer_blocks.0.attn.to_q.weight",
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "model.diffusion_model.input_blocks.1.1.proj_in.weight",
        UNET + "attn2.to_out.0.bias",
        UNET + "attn2.to_q.lora.weight",
    ],
)
def test_others_are_left_alone(name: str) -> None:
    stem = name.rpartition(".to_")[0]
    names = [f"{stem}.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert siblings(name, [name, *names]) is None


def test_normalised_queries_are_left_alone() -> None:
    stem = "transformer.transformer_blocks.0.attn2."
    names = [f"{stem}{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert find(names[0], names) is not None
    assert find(names[0], [*names, stem + "norm_q.weight"]) is None
    assert find(names[2], names[:3]) is None


def test_old_names_of_a_vae() -> None:
    stem = "vae.encoder.mid_block.attentions.0."
    names = [f"{stem}{part}.{kind}" for part in ("query", "key", "value", "proj_attn") for kind in ("weight", "bias")]
    assert siblings(names[0], names) == (names[1], names[2], names[3])
    assert siblings(names[6], names) == (names[4], names[5])
    assert siblings(names[7], names) is None


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_file({name: x.float() if x.is_floating_point() else x for name, x in load_file(TINY).items()}, path)
    return path


def test_a_whole_model_paints_the_same(tiny: Path, tmp_path: Path) -> None:
    """Its UNet, VAE and text encoder, whose attentions have four heads, and one, which four parts are a part of."""
    out = tmp_path / "out.safetensors"
    sdmerge.merge("balance_attention", [tiny], {"heads": 4}, output=out)
    before, after = load_file(tiny), load_file(out)
    assert before.keys() == after.keys()
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    parts = ("to_q", "to_k", "to_v", "to_out.0.weight", "self_attn", "mid.attn_1")
    assert changed == {name for name in before if siblings(name, before) is not None}
    assert all(any(part in name for part in parts) for name in changed)
    assert len(changed) > 100
    verdict = sdmerge.verify(out, inputs=tmp_path)
    assert verdict.identical
    for was, now in zip(run_tiny(tiny), run_tiny(out), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-4)


def run_tiny(path: Path) -> list[Tensor]:
    """Load a single file into diffusers' and transformers' networks, and run each."""
    pipeline = demo.load_pipeline(path, TINY.parent / "config")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = pipeline.text_encoder(torch.arange(77)[None] % 700)[0]
        return [context, pipeline.unet(noise, 500, context).sample, pipeline.vae.decode(noise).sample]


def test_a_merge_of_balanced_models_is_one_pass(tiny: Path, tmp_path: Path) -> None:
    """Nested: the same as balancing first and merging then, but for the rounding in between."""
    other = tmp_path / "other.safetensors"
    save_file(
        {
            n: x.float() if x.is_floating_point() else x
            for n, x in load_file(TINY.with_name("tiny-shape.safetensors")).items()
        },
        other,
    )
    recipe = tmp_path / "r.yaml"
    balance = "{{method: balance_attention, models: [{}], parameters: {{heads: 4}}}}"
    recipe.write_text(
        f"models: {{a: {tiny}, b: {other}}}\nmerge:\n  method: weighted_sum\n"
        f"  models: [{balance.format('a')}, {balance.format('b')}]\n  parameters: {{alpha: 0.25}}\n"
    )
    sdmerge.run_recipe(recipe, output=tmp_path / "nested.safetensors")
    for path in (tiny, other):
        sdmerge.merge("balance_attention", [path], {"heads": 4}, output=path.with_suffix(".b.safetensors"))
    sdmerge.weighted_sum(
        [tiny.with_suffix(".b.safetensors"), other.with_suffix(".b.safetensors")],
        alpha=0.25,
        output=tmp_path / "two.safetensors",
    )
    nested, two = load_file(tmp_path / "nested.safetensors"), load_file(tmp_path / "two.safetensors")
    for name, x in nested.items():
        torch.testing.assert_close(x, two[name], rtol=1e-6, atol=1e-6)


def test_a_merge_is_balanced_as_a_whole(tiny: Path, tmp_path: Path) -> None:
    """The siblings of a merge are merged too."""
    recipe = tmp_path / "r.yaml"
    other = TINY.with_name("tiny-shape.safetensors")
    recipe.write_text(
        f"models: {{a: {tiny}, b: {other}}}\nmerge:\n  method: balance_attention\n"
        "  models: [{method: weighted_sum, models: [a, b]}]\n  parameters: {heads: 4}\n"
    )
    sdmerge.run_recipe(recipe, output=tmp_path / "nested.safetensors", dtype="fp32")
    sdmerge.weighted_sum([tiny, other], alpha=0.5, output=tmp_path / "one.safetensors", dtype="fp32")
    sdmerge.merge(
        "balance_attention", [tmp_path / "one.safetensors"], {"heads": 4}, output=tmp_path / "two.safetensors"
    )
    nested, two = load_file(tmp_path / "nested.safetensors"), load_file(tmp_path / "two.safetensors")
    for name, x in nested.items():
        torch.testing.assert_close(x, two[name], rtol=1e-5, atol=1e-6)


def test_unknown_numbers_of_heads_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="number of heads is not known; give it with -p heads=N"):
        sdmerge.merge("balance_attention", [tiny], output=tmp_path / "out.safetensors")
    with pytest.raises(RequestError, match="which are not 7 heads"):
        sdmerge.merge("balance_attention", [tiny], {"heads": 7}, output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_sibling_of_another_type_is_refused(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny)
    name = next(name for name in tensors if name.endswith("attn1.to_k.weight"))
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tiny)
    with pytest.raises(MismatchError, match=r"attn1\.to_k\.weight': is I8"):
        sdmerge.merge("balance_attention", [tiny], {"heads": 4}, output=tmp_path / "out.safetensors")

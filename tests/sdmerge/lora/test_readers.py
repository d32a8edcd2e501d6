"""Independent readers agree: diffusers and PEFT load what we write, and we read what they write, module by module.

Networks are tiny and built from configs; nothing is downloaded.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdmerge
from sdformats.adapters import open_adapter
from sdformats.files import open_source
from sdmerge.lora.delta import delta
from sdmerge.lora.refs import value

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.adapters.tensors import Ref

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
Tensors = dict[str, Tensor]
WIDTH = 768
MODULES = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (2, 1.0),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (3, 4.0),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": (2, None),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (4, 0.7),
    "unet.down_blocks.0.resnets.0.conv1": (2, 3.0),
    "unet.up_blocks.1.attentions.0.proj_in": (2, 1.0),
    "te1.text_model.encoder.layers.0.self_attn.q_proj": (2, 1.0),
    "te1.text_model.encoder.layers.0.mlp.fc1": (5, 2.0),
}
"""Rank and alpha of each; alpha None is one that the file does not hold."""


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a UNet and a text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unet, transformers.CLIPTextModel(config)


def pipeline() -> Any:
    """Return a pipeline of them, without an autoencoder and a tokenizer."""
    unet, text_encoder = networks()
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights(unet: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """Return every weight by our module's path."""
    found = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in text_encoder.state_dict().items():
        found[f"te1.text_model.{name.removeprefix('text_model.')}"] = tensor
    ends = (".weight", ".base_layer.weight")
    return {
        name.removesuffix(".weight").removesuffix(".base_layer"): tensor.detach().double().clone()
        for name, tensor in found.items()
        if name.endswith(ends) and ".lora_" not in name
    }


def kohya_file(folder: Path, *, dora: bool = False, only: str = "", uniform: bool = False) -> Path:
    """Write an adapter for some modules of both networks as sd-scripts does, with mixed ranks and alphas."""
    shapes = {path: tuple(tensor.shape) for path, tensor in weights(*networks()).items()}
    torch.manual_seed(1)
    tensors: Tensors = {}
    for path, (rank, alpha) in MODULES.items():
        if not path.startswith(only):
            continue
        component, _, rest = path.partition(".")
        module = {"unet": "lora_unet_", "te1": "lora_te_"}[component] + rest.replace(".", "_")
        shape, rank_here = shapes[path], 2 if uniform else rank
        ones = (1,) * (len(shape) - 2)
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank_here, *shape[1:]) * 0.1
        tensors[f"{module}.lora_up.weight"] = torch.randn(shape[0], rank_here, *ones) * 0.1
        if uniform or alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(1.0 if uniform else alpha)
        if dora:
            tensors[f"{module}.dora_scale"] = torch.rand(shape[0], 1, *ones) + 0.5
    path_of = folder / "kohya.safetensors"
    save_file(tensors, str(path_of))
    return path_of


def double(ref: Ref) -> Tensor:
    """Return a tensor in float64."""
    return value(ref).double()


def changes(file: Path, base: dict[str, Tensor], config: Path | None = None) -> dict[str, Tensor]:
    """Return what an adapter adds to each module's weight, as we read it."""
    with open_source(file) as source:
        adapter, _ = open_adapter(source, config)
        return {path: delta(record, double, base[path]) for path, record in adapter.modules.items()}


def check(found: dict[str, Tensor], base: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check every module: those of the adapter changed as expected, the others not at all."""
    assert expected
    for path, before in base.items():
        change = found[path].reshape(before.shape) - before
        if path in expected:
            assert expected[path].abs().max() > 1e-3
            assert torch.allclose(change, expected[path].reshape(before.shape), rtol=1e-4, atol=1e-5), path
        else:
            assert torch.equal(found[path], before), path


def fused(file: Path) -> dict[str, Tensor]:
    """Return the weights after diffusers has loaded and fused an adapter."""
    pipe = pipeline()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    return weights(pipe.unet, pipe.text_encoder)


def test_diffusers_loads_mixed_ranks_and_alphas(tmp_path: Path) -> None:
    source = kohya_file(tmp_path)
    sdmerge.convert(source, tmp_path / "out.safetensors", to="diffusers", family="sd1")
    base = weights(*networks())
    check(fused(tmp_path / "out.safetensors"), base, changes(source, base))


def test_diffusers_loads_dora(tmp_path: Path) -> None:
    source = kohya_file(tmp_path, dora=True, only="unet")
    sdmerge.convert(source, tmp_path / "out.safetensors", to="diffusers", family="sd1")
    base = weights(*networks())
    check(fused(tmp_path / "out.safetensors"), base, changes(source, base))


def test_diffusers_loads_its_old_layout(tmp_path: Path) -> None:
    source = kohya_file(tmp_path, uniform=True)
    sdmerge.convert(source, tmp_path / "out.safetensors", to="diffusers-old", family="sd1", allow_loss=True)
    base = weights(*networks())
    expected = changes(tmp_path / "out.safetensors", base)
    attention = [path for path in MODULES if ".attn" in path]
    assert set(attention) <= set(expected)
    check(fused(tmp_path / "out.safetensors"), base, expected)
    before = changes(source, base)
    assert all(torch.allclose(expected[path], before[path], rtol=1e-6, atol=1e-7) for path in attention)


def test_diffusers_loads_the_kohya_layout(tmp_path: Path) -> None:
    """With one alpha for all: it takes the most frequent one where they are mixed.

    Of the UNet alone: diffusers 0.42 does not find the text encoder's attention of sd-scripts' files in transformers 5's.
    """
    first = kohya_file(tmp_path, uniform=True, only="unet")
    sdmerge.convert(first, tmp_path / "peft", to="peft", family="sd1")
    sdmerge.convert(tmp_path / "peft", tmp_path / "out.safetensors", to="kohya", family="sd1")
    base = weights(*networks())
    check(fused(tmp_path / "out.safetensors"), base, changes(first, base))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_merges_what_we_write(dora: bool, tmp_path: Path) -> None:
    source = kohya_file(tmp_path, dora=dora, only="unet")
    sdmerge.convert(source, tmp_path / "out", to="peft", family="sd1")
    unet, text_encoder = networks()
    base = weights(unet, text_encoder)
    merged = peft.PeftModel.from_pretrained(unet, tmp_path / "out").merge_and_unload()
    check(weights(merged, text_encoder), base, changes(source, base))


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": ("LoraConfig", {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5}}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_what_peft_writes(name: str, tmp_path: Path) -> None:
    kind, options = CONFIGS[name]
    unet, text_encoder = networks()
    base = weights(unet, text_encoder)
    wrapped = peft.get_peft_model(unet, getattr(peft, kind)(target_modules=["to_q", "to_k", "conv1"], **options))
    torch.manual_seed(2)
    for key, parameter in wrapped.named_parameters():
        if "magnitude" in key:
            parameter.data.mul_(1.2)
        elif parameter.requires_grad:
            parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path)
    expected = changes(tmp_path, base)
    assert any("conv1" in path for path in expected)
    check(weights(wrapped.merge_and_unload(), text_encoder), base, expected)


def test_we_read_what_diffusers_writes(tmp_path: Path) -> None:
    """Its scales are in the metadata, and its text encoder has transformers 5's names, without ``text_model.``."""
    pipe = pipeline()
    base = weights(pipe.unet, pipe.text_encoder)
    for network, names in ((pipe.unet, ["to_q", "conv1"]), (pipe.text_encoder, ["q_proj", "fc1"])):
        network.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False))
    peft_state = peft.utils.get_peft_model_state_dict
    metadata = {f"{name}_lora_adapter_metadata": network.peft_config["default"].to_dict()
                for name, network in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder))}  # fmt: skip
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft_state(pipe.unet),
        text_encoder_lora_layers=peft_state(pipe.text_encoder),
        **metadata,
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    expected = changes(file, base)
    assert all(".text_model." in path for path in expected if path.startswith("te1."))
    pipe.fuse_lora()
    check(weights(pipe.unet, pipe.text_encoder), base, expected)
    sdmerge.convert(file, tmp_path / "kohya.safetensors", to="kohya", family="sd1")
    names = load_file(tmp_path / "kohya.safetensors")
    assert {name.split("_encoder_layers")[0] for name in names if "layers" in name} == {"lora_te_text_model"}


def test_the_metadata_that_diffusers_reads_name_modules_as_it_does(tmp_path: Path) -> None:
    sdmerge.convert(kohya_file(tmp_path), tmp_path / "out.safetensors", to="diffusers", family="sd1")
    with open_source(tmp_path / "out.safetensors") as source:
        told = json.loads(source.metadata["lora_adapter_metadata"])
    assert not any("text_model." in name for name in told["text_encoder.target_modules"])
    assert any(".text_model." in name for name in load_file(tmp_path / "out.safetensors"))


@pytest.mark.parametrize("seed", [0, 1])
def test_flux_names_are_those_of_diffusers(seed: int, tmp_path: Path) -> None:
    """Its own conversion of sd-scripts' names finds the modules, and the same products of factors."""
    torch.manual_seed(seed)
    width = 3072
    modules = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")]
    modules += ["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj"]
    modules += [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    tensors = {}
    down = torch.randn(2, width)
    for module in modules:
        rows = 4 * width if module.endswith("proj_mlp") else width
        tensors[f"transformer.{module}.lora_A.weight"] = down.clone()
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(tensors, str(tmp_path / "in.safetensors"))
    sdmerge.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="flux-kohya")
    found = diffusers.FluxPipeline.lora_state_dict(load_file(tmp_path / "out.safetensors"))
    found = found[0] if isinstance(found, tuple) else found
    for module in modules:
        ours, theirs = (
            states[f"transformer.{module}.lora_B.weight"] @ states[f"transformer.{module}.lora_A.weight"]
            for states in (tensors, found)
        )
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4), module

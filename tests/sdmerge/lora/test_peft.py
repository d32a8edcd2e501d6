"""peft makes of our folders what we say, and we make of its folders what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdmerge import convert
from tests.sdmerge.lora.pipelines import (
    all_weights,
    assert_same_changes,
    lora_file,
    our_changes,
    pipeline,
    unet,
    weights_of,
)
from tests.sdmerge.lora.records import numbers

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("diffusers", reason="builds the networks")
peft = pytest.importorskip("peft", reason="is an independent reader")

FOLDERS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class _Named(nn.Module):
    """A text encoder whose names begin with ``text_model.``, as we always write them; transformers 5 leaves it out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.text_model = network


def merged(network: nn.Module, folder: Path, component: str) -> dict[str, Tensor]:
    """Return the weights after peft has loaded a folder and merged it."""
    model = peft.PeftModel.from_pretrained(network, str(folder))
    return weights_of(model.merge_and_unload(), component)


# peft asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_peft_reads_mixed_ranks_and_alphas_of_all_networks(tmp_path: Path, family: str, dora: bool) -> None:
    pipe = pipeline(family)
    before = all_weights(pipe)
    file = lora_file(tmp_path / "in.safetensors", before, family, dora=dora)
    convert(file, tmp_path / "out", to="peft")
    changes = our_changes(file, before)
    for component, name in FOLDERS.items():
        network = getattr(pipe, name, None)
        if network is None:
            continue
        own = {path: change for path, change in changes.items() if path.startswith(f"{component}.")}
        if component == "te1" and not hasattr(network, "text_model"):
            network = _Named(network)
        expected = weights_of(network, component)
        assert own.keys() == expected.keys(), "every module is in the file"
        assert_same_changes(merged(network, tmp_path / "out" / name, component), expected, own)


def trained(config: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a folder by peft, of factors that change something; return the weights before, and as peft merges them."""
    network = unet("sd1")
    before = weights_of(network, "unet")
    model = peft.get_peft_model(network, config)
    seed = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            seed += 1
            made = numbers(seed, *parameter.shape)
            parameter.data.copy_(made.abs() + 0.5 if "magnitude" in name else made)
    model.save_pretrained(str(folder))
    return before, weights_of(model.merge_and_unload(), "unet")


CONVS = ["conv1", "conv2", "conv_shortcut"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=ATTENTION + CONVS),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=ATTENTION),
    "patterns": lambda: peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=ATTENTION + CONVS,
        rank_pattern={"to_q": 3, "down_blocks.0.resnets.0.conv1": 1},
        alpha_pattern={"attn2.to_k": 5, "conv2": 4},
    ),
    "rslora with patterns": lambda: peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=ATTENTION,
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_k": 5},
    ),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=ATTENTION + CONVS),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=ATTENTION + CONVS),
    "loha with cores": lambda: peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=CONVS),
    "loha with patterns": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=ATTENTION, rank_pattern={"to_q": 1}, alpha_pattern={"to_k": 5}
    ),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=ATTENTION + CONVS),
    "lokr of both": lambda: peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, target_modules=ATTENTION
    ),
    "lokr with cores": lambda: peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=CONVS),
    # PEFT multiplies with alpha / r even where both factors are whole, which LyCORIS does not.
    "lokr, whole": lambda: peft.LoKrConfig(r=8, alpha=3, target_modules=ATTENTION + CONVS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION),
    "exact oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=ATTENTION),
    "oft of three terms": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["to_q"]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_read_as_it_merges_it(tmp_path: Path, name: str) -> None:
    before, after = trained(CONFIGS[name](), tmp_path / "saved")
    changes = our_changes(tmp_path / "saved" / "adapter_model.safetensors", before)
    assert changes
    assert_same_changes(after, before, changes, 1e-5)


@pytest.mark.parametrize("name", ["patterns", "rslora", "dora"])
def test_what_peft_saves_is_the_same_in_our_folder(tmp_path: Path, name: str) -> None:
    before, after = trained(CONFIGS[name](), tmp_path / "saved")
    convert(tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "out", to="peft")
    found = merged(unet("sd1"), tmp_path / "out", "unet")
    for path in before:
        torch.testing.assert_close(found[path], after[path])
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "saved"))
    assert ours.keys() == theirs.keys()

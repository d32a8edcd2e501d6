"""Files that go with a model: what is broken, or for another model, is refused in one line that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import concept, embedding_effects
from sdformats.errors import FormatError
from sdmerge.applied import Files, apply
from sdmerge.errors import NonFiniteInput, RequestError
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = ModelSettings(model=str(concept.TINY / "tiny-base.safetensors"), model_config=str(concept.TINY / "config"))
LORA = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(72, 2),
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 72),
    "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
}


def wrong(number: float) -> torch.Tensor:
    """Return numbers one of which is none."""
    found = torch.zeros(1, 48)
    found[0, 40] = number
    return found


def given(what: str, path: Path) -> Files:
    """Return a request for one file."""
    values: dict[str, Any] = {
        "embedding": {"embeddings": (path,)},
        "style": {"aesthetic": (path, 5), "clip": str(embedding_effects.TOWER)},
        "null": {"null_text": path},
        "image": {"image": path},
    }
    return Files(**values[what])


@pytest.mark.parametrize(
    ("what", "tensors", "kind", "said"),
    [
        ("embedding", {"emb_params": wrong(float("nan"))}, NonFiniteInput, "holds NaN or infinity"),
        ("style", {"aesthetic": wrong(float("inf"))}, NonFiniteInput, "holds NaN or infinity"),
        ("null", {"null_text": wrong(float("nan")).expand(3, 1, 77, 48)}, NonFiniteInput, "holds NaN or infinity"),
        ("image", {"clip_image": wrong(float("-inf"))}, NonFiniteInput, "holds NaN or infinity"),
        ("embedding", LORA, RequestError, "is an adapter; take the embeddings"),
        ("style", LORA, FormatError, "is no aesthetic embedding"),
        ("null", LORA, FormatError, "is an adapter.*expected null-text inversion"),
        ("image", LORA, FormatError, "is an adapter.*expected a CLIP inversion"),
        (
            "embedding",
            {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)},
            RequestError,
            "is not for this model .it has clip_l 768, clip_g 1280; expected clip_l 48",
        ),
        ("style", {"aesthetic": torch.zeros(1, 40)}, RequestError, "is a style 40 wide"),
        (
            "null",
            {"null_text": torch.zeros(3, 1, 77, 40)},
            RequestError,
            "is for texts 40 wide, and the model's are 48",
        ),
        ("image", {"clip_image": torch.zeros(1, 40)}, RequestError, "is 40 wide, and the model is told 48"),
    ],
)
def test_what_does_not_fit_is_named(
    what: str, tensors: dict[str, torch.Tensor], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "given.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    networks = load(SETTINGS)
    with pytest.raises(kind, match=said) as caught:
        apply(given(what, path), networks, SETTINGS)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)

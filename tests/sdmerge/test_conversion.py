"""Converting: what a file is decides who converts it, and what may be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdmerge import api
from sdmerge.errors import RequestError
from tests.formats.adapters.samples import noise
from tests.formats.adapters.samples import save as save_adapter
from tests.sdmerge.toys import saved

if TYPE_CHECKING:
    from pathlib import Path

LORA = {
    "lora_unet_conv_in.lora_down.weight": noise(4, 4, 3, 3),
    "lora_unet_conv_in.lora_up.weight": noise(8, 4, 1, 1),
    "lora_unet_conv_in.alpha": torch.tensor(2.0),
}


def test_an_adapter_without_a_layout_is_copied(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "a.safetensors", LORA)
    report = api.convert(source, tmp_path / "b.safetensors")
    assert report.counts == {"copy": 3}
    assert load_file(tmp_path / "b.safetensors").keys() == LORA.keys()


def test_an_adapter_s_options_need_a_layout(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "a.safetensors", LORA)
    with pytest.raises(RequestError, match="name the layout to convert the adapter to"):
        api.convert(source, tmp_path / "b.safetensors", form="full")


def test_what_is_not_for_a_kind_is_refused_by_its_option(tmp_path: Path) -> None:
    source = saved(tmp_path, "a", 0)
    with pytest.raises(
        RequestError, match=r"a\.safetensors: is checkpoint, and --adapter-config is not for such files"
    ):
        api.convert(source, tmp_path / "b.safetensors", adapter_config=tmp_path / "c.json")


def test_other_files_are_copied(tmp_path: Path) -> None:
    save_file({"a.b": torch.ones(3)}, tmp_path / "a.safetensors")
    assert api.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors == 1

"""Custom Diffusion: the delta, read back, is what was trained; new words; compression; pictures shown in other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import concept
from sdformats.custom_diffusion.delta import read_custom_diffusion
from sdformats.files import open_source
from sdformats.tensor import DType
from sdmerge.errors import RequestError
from sdmerge.lora.refs import value
from sdmerge.train.beside import put, stands_beside
from sdmerge.train.buckets import draws
from sdmerge.train.custom_diffusion import CustomDiffusion
from sdmerge.train.loading import load
from sdmerge.train.saving import product
from sdmerge.train.settings import ModelSettings
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ("a <new1> diamond", "a large red heart", "two <new1>s")
CLOSE = 1e-5
WORDS = {"words": ("<new1>",), "init": ("cross",)}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = concept.diamonds(8, seed=1, token="<new1> diamond")
    return concept.write(pictures, tmp_path_factory.mktemp("named"))


@pytest.mark.parametrize(
    ("name", "values"),
    [("d.bin", {}), ("d.safetensors", {"to": "original"}), ("d.ckpt", {"to": "original"}), ("d.bin", {"rank": 48})],
    ids=str,
)
def test_the_delta_read_back_is_what_was_trained(
    name: str, values: dict[str, Any], toy: Path, named: Path, tmp_path: Path
) -> None:
    run = runs.trained("custom-diffusion", toy, named, tmp_path / name, steps=3, lr=1e-2, **WORDS, **values)
    networks = load(ModelSettings(model=str(toy)))
    with open_source(tmp_path / name) as source:
        assert read_custom_diffusion(source).compressed == ("rank" in values)
    assert stands_beside(tmp_path / name)
    put(networks, tmp_path / name, 1.0)
    before = runs.painted(load(ModelSettings(model=str(toy))), texts=runs.TEXTS)
    assert (runs.painted(networks, texts=runs.TEXTS) - before).abs().max() > 1e-3
    assert (runs.painted(networks, texts=TEXTS) - runs.painted(run.networks, texts=TEXTS)).abs().max() < CLOSE


def test_only_keys_values_and_the_word_are_trained(toy: Path, named: Path, tmp_path: Path) -> None:
    run = runs.trained("custom-diffusion", toy, named, tmp_path / "d", steps=2, lr=1e-2, to="diffusers", **WORDS)
    base = load(ModelSettings(model=str(toy)))
    for name, before in base.unet.state_dict().items():
        trained = name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
        assert torch.equal(before, run.networks.unet.state_dict()[name]) != trained, name
    for name, before in base.texts[0].model.state_dict().items():
        assert torch.equal(before, run.networks.texts[0].model.state_dict()[name]), name
    word = load_file(tmp_path / "d" / "<new1>.safetensors")["<new1>"]
    assert (word - base.texts[0].vectors("cross")[0]).abs().max() > 1e-3
    assert any(
        "to_k_custom_diffusion" in name
        for name in load_file(tmp_path / "d" / "pytorch_custom_diffusion_weights.safetensors")
    )


def test_compression_is_the_best_of_its_rank() -> None:
    source = torch.Generator().manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        base = torch.randn(shape, generator=source)
        change = torch.randn(shape, generator=source)
        made = product(base + change, base, 5, DType.F32)
        u, s, v = torch.linalg.svd(change)
        best = u[:, :5] @ torch.diag(s[:5]) @ v[:5]
        torch.testing.assert_close(value(made.up) @ value(made.down), best, atol=1e-4, rtol=1e-3)


def test_pictures_are_shown_smaller_and_larger_with_words_that_say_so(toy: Path, named: Path, tmp_path: Path) -> None:
    method = CustomDiffusion(rescale=True)
    assert method.variants() == 4
    picture = Image.new("RGB", (60, 40), "red")
    shown = [method.vary(picture, i) for i in range(4)]
    assert [one.size for one in shown] == [(60, 40), (86, 57), (150, 100), (46, 31)]
    assert shown[2].getpixel((0, 0))[3] == 0
    assert shown[2].getpixel((75, 50)) == (255, 0, 0, 255)
    said = {method.caption("x", 2, draws(i)) for i in range(9)}
    assert said == {"a far away x", "very small x"}
    run = runs.trained("custom-diffusion", toy, named, tmp_path / "d.bin", steps=2, rescale=True, **WORDS)
    masks = torch.cat([run.sources[0](i).mask for i in range(8)])  # type: ignore[misc]
    assert 0 <= float(masks.min()) < 0.2
    assert float(masks.max()) == 1.0


def test_words_that_are_there_already_are_refused(toy: Path, named: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="vocabulary already"):
        runs.trained("custom-diffusion", toy, named, tmp_path / "d.bin", steps=1, words=("red",))
    with pytest.raises(RequestError, match="one for each"):
        runs.trained(
            "custom-diffusion", toy, named, tmp_path / "d.bin", steps=1, words=("<a>", "<b>", "<c>"), init=("a", "b")
        )

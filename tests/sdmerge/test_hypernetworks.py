"""Hypernetworks converted, merged, and folded into the toy model: judged by torch hooks in the UNet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdmerge
from sdformats.errors import FormatError
from sdmerge.errors import FamilyError, MismatchError, NonFiniteInput, RequestError
from tests.formats.hypernetworks import ACTIVATIONS, FULL, a1111, apply, novelai, random_linear
from tests.formats.pickle_oracle import same
from tests.sdmerge import toys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
WIDTHS = (48, 32, 64, 72)
"""Of the tiny model: the context's, and its levels'."""
Pair = tuple["nn.ModuleDict", "nn.ModuleDict"]


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def plain(value: Any) -> Any:
    """Return plain dicts in place of ordered ones."""
    return {key: tuple(map(dict, item)) if isinstance(key, int) else item for key, item in value.items()}


structures = st.lists(st.sampled_from([1, 2, 3, 1.5, 0.5]), max_size=3).map(lambda inner: [1, *inner, 1])
choices = structures.flatmap(
    lambda structure: st.fixed_dictionaries(
        {
            "step": st.integers(0, 10**9),
            "name": st.none() | st.text(max_size=8).filter(lambda text: text != "null"),
            "layer_structure": st.just(structure),
            "activation_func": st.sampled_from([None, "linear", *ACTIVATIONS]),
            "is_layer_norm": st.booleans(),
            "weight_initialization": st.sampled_from(["Normal", "KaimingNormal"]),
            "sd_checkpoint": st.none() | st.just("abcd1234"),
            "sd_checkpoint_name": st.none() | st.just("model.ckpt"),
            "activate_output": st.booleans(),
            "use_dropout": st.booleans(),
            "dropout_structure": st.lists(
                st.sampled_from([0, 0.1, 0.3]), min_size=len(structure), max_size=len(structure)
            ),
            "last_layer_dropout": st.booleans(),
            "optional_info": st.none() | st.text(max_size=8).filter(lambda text: text != "null"),
        }
    )
)


class TestConversion:
    @settings(max_examples=50)
    @given(choices)
    def test_a1111_to_safetensors_and_back(
        self, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]
    ) -> None:
        folder = tmp_path_factory.getbasetemp()
        value = a1111({key: chosen[key] for key in FULL}, (4, 6))  # in the order in which A1111 writes
        first = saved(folder / "h.pt", value)
        sdmerge.convert(first, folder / "h.safetensors", overwrite=True)
        sdmerge.convert(folder / "h.safetensors", folder / "again.pt", overwrite=True)
        assert same(torch.load(folder / "again.pt", weights_only=True), plain(value))
        assert load_file(folder / "h.safetensors").keys() == {
            f"{width}.{side}.{name}" for width in (4, 6) for side in (0, 1) for name in value[width][side]
        }

    def test_novelai_to_a1111_and_back(self, tmp_path: Path) -> None:
        value = novelai((4, 6))
        first = saved(tmp_path / "n.pt", value)
        sdmerge.convert(first, tmp_path / "a.pt", to="a1111")
        loaded = torch.load(tmp_path / "a.pt", weights_only=True)
        assert list(loaded[4][0]) == ["linear.0.weight", "linear.0.bias", "linear.1.weight", "linear.1.bias"]
        assert (loaded["layer_structure"], loaded["activation_func"]) == ([1, 2, 1], None)
        sdmerge.convert(tmp_path / "a.pt", tmp_path / "b.safetensors", to="novelai")
        sdmerge.convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
        assert same(torch.load(tmp_path / "c.pt", weights_only=True), plain(value))

    def test_in_another_type(self, tmp_path: Path) -> None:
        value = a1111(FULL, (4,))
        sdmerge.convert(saved(tmp_path / "h.pt", value), tmp_path / "half.pt", dtype="fp16")
        half = torch.load(tmp_path / "half.pt", weights_only=True)
        assert same(half[4][1], {name: tensor.half() for name, tensor in value[4][1].items()})

    def test_what_is_no_layout_and_no_name(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "h.pt", a1111(FULL, (4,)))
        with pytest.raises(RequestError, match=r"'kohya' is no layout of hypernetwork files .expected a1111, novelai"):
            sdmerge.convert(path, tmp_path / "o.pt", to="kohya")
        with pytest.raises(FormatError, match="two linear layers"):
            sdmerge.convert(path, tmp_path / "o.pt", to="novelai")
        with pytest.raises(RequestError, match=r"expected a name that ends in .safetensors or .ckpt or .pt"):
            sdmerge.convert(path, tmp_path / "o.txt")
        assert sdmerge.convert(path, tmp_path / "o.pt", dry_run=True).written is False
        assert not (tmp_path / "o.pt").exists()


class TestMerging:
    def pair(self, tmp_path: Path, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Path]:
        return [saved(tmp_path / f"{i}.pt", a1111(one, (4, 6))) for i, one in enumerate((first, second))]

    @pytest.mark.parametrize("output", ["m.pt", "m.safetensors"])
    def test_equal_structures(self, tmp_path: Path, output: str) -> None:
        files = self.pair(tmp_path, FULL, {**FULL, "name": "other", "step": 7})
        one, two = (torch.load(path) for path in files)
        sdmerge.weighted_sum(files, alpha=0.25, output=tmp_path / output)
        sdmerge.convert(tmp_path / output, tmp_path / "read.pt")
        merged = torch.load(tmp_path / "read.pt", weights_only=True)
        for width in (4, 6):
            for side in (0, 1):
                for name, tensor in one[width][side].items():
                    expected = tensor.double() * 0.75 + two[width][side][name].double() * 0.25
                    assert torch.allclose(merged[width][side][name].double(), expected, rtol=1e-6, atol=1e-7)
        assert {key: merged[key] for key in FULL} == dict(FULL)
        assert sdmerge.verify(tmp_path / output).identical

    def test_the_result_loads_as_what_it_is(self, tmp_path: Path) -> None:
        files = self.pair(tmp_path, FULL, FULL)
        sdmerge.merge("add_difference", [files[0], files[1], files[0]], output=tmp_path / "m.pt")
        found = sdmerge.inspect_path(tmp_path / "m.pt")
        assert (found["kind"], found["layout"], found["warnings"]) == ("hypernetwork", "a1111", [])
        assert "sdmerge.recipe" in found["metadata"]

    @pytest.mark.parametrize(
        "change",
        [
            {"activation_func": "relu"},
            {"activate_output": True},
            {"layer_structure": [1, 2, 2, 1]},
            {"is_layer_norm": False},
        ],
    )
    def test_other_structures_are_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        files = self.pair(tmp_path, FULL, {**FULL, **change})
        with pytest.raises(
            MismatchError, match=r"1.pt: is built otherwise than A .*; expected widths 4, 6; layers 1, 2, 1, 1"
        ):
            sdmerge.weighted_sum(files, output=tmp_path / "m.pt")

    def test_a_model_or_blocks_among_them(self, tmp_path: Path) -> None:
        files = self.pair(tmp_path, FULL, FULL)
        with pytest.raises(RequestError, match="can be merged with hypernetworks only"):
            sdmerge.weighted_sum([files[0], toys.saved(tmp_path, "a", 1)], output=tmp_path / "m.pt")
        blocks = sdmerge.Weights.from_yaml({"value": 0.5, "blocks": {"IN01": 0.1}})
        with pytest.raises(RequestError, match="has no blocks"):
            sdmerge.weighted_sum(files, alpha=blocks, output=tmp_path / "m.pt")


def pairs(seed: int, layers: tuple[int, ...] = (1, 2, 1), widths: Sequence[int] = WIDTHS) -> dict[int, Pair]:
    return {
        width: (random_linear(width, seed + width, layers), random_linear(width, seed + width + 1000, layers))
        for width in widths
    }


def file_of(path: Path, made: Mapping[int, Pair], **settings: Any) -> Path:
    return saved(path, {w: tuple(side.state_dict() for side in pair) for w, pair in made.items()} | settings)


def unet_of(path: Path) -> nn.Module:
    import diffusers

    pipeline: Any = diffusers.StableDiffusionPipeline.from_single_file(
        str(path), config=str(TINY / "config"), local_files_only=True
    )
    unet: nn.Module = pipeline.unet.float().eval()
    return unet


@torch.no_grad()
def output_of(unet: nn.Module) -> Tensor:
    source = torch.Generator().manual_seed(3)
    latents, context = torch.randn(2, 4, 8, 8, generator=source), torch.randn(2, 77, 48, generator=source)
    result: Tensor = unet(latents, torch.tensor([600, 20]), context).sample
    return result


def hooked(unet: nn.Module, loaded: Sequence[tuple[Mapping[int, Pair], Callable[[str], float]]]) -> Tensor:
    """Return the output of a UNet whose keys and values read what hypernetworks make, one after the other."""
    hooks = []
    for name, module in unet.named_modules():
        if name.endswith((".to_k", ".to_v")):
            side = 0 if name.endswith("to_k") else 1

            def hook(module: Any, args: tuple[Tensor, ...], side: int = side, name: str = name) -> tuple[Tensor]:
                values = args[0]
                for made, strength in loaded:
                    if module.in_features in made:
                        values = apply(made[module.in_features][side], values, strength(name))
                return (values,)

            hooks.append(module.register_forward_pre_hook(hook))
    result = output_of(unet)
    for one in hooks:
        one.remove()
    return result


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return unet_of(TINY / "tiny-base.safetensors")


class TestFolding:
    def bake(self, tmp_path: Path, added: Sequence[tuple[Path, Any]]) -> nn.Module:
        output = tmp_path / "folded.safetensors"
        sdmerge.bake(TINY / "tiny-base.safetensors", added, output=output, dtype="fp32", overwrite=True)
        return unet_of(output)

    @pytest.mark.parametrize("layers", [(1, 2, 1), (1, 1), (1, 2, 3, 1)])
    def test_a_linear_one_is_exact(self, tmp_path: Path, base: nn.Module, layers: tuple[int, ...]) -> None:
        made = pairs(1, layers)
        path = file_of(tmp_path / "h.pt", made, layer_structure=list(layers), activation_func="linear")
        expected = hooked(base, [(made, lambda _: 0.8)])
        assert (expected - output_of(base)).abs().max() > 0.1
        assert (output_of(self.bake(tmp_path, [(path, 0.8)])) - expected).abs().max() <= 1e-5

    def test_several_follow_each_other(self, tmp_path: Path, base: nn.Module) -> None:
        one, two = pairs(1), pairs(50, widths=(48, 64))
        files = [file_of(tmp_path / "1.pt", one), file_of(tmp_path / "2.pt", two)]
        expected = hooked(base, [(one, lambda _: 0.7), (two, lambda _: -0.6)])
        other = hooked(base, [(two, lambda _: -0.6), (one, lambda _: 0.7)])
        assert (expected - other).abs().max() > 1e-3
        baked = output_of(self.bake(tmp_path, list(zip(files, (0.7, -0.6), strict=True))))
        assert (baked - expected).abs().max() <= 1e-5

    def test_strengths_by_block(self, tmp_path: Path, base: nn.Module) -> None:
        made = pairs(1)
        weights = sdmerge.Weights.from_yaml(
            {"value": 0.2, "blocks": {"M00": 1.0}, "rules": ["*.attn2.to_v.weight:0.5"]}
        )
        expected = hooked(
            base,
            [(made, lambda name: 0.5 if name.endswith("attn2.to_v") else 1.0 if name.startswith("mid_block") else 0.2)],
        )
        baked = output_of(self.bake(tmp_path, [(file_of(tmp_path / "h.pt", made), weights)]))
        assert (baked - expected).abs().max() <= 1e-5

    def test_the_fold_is_rounded_once(self, tmp_path: Path) -> None:
        made = pairs(1)
        output = tmp_path / "folded.safetensors"
        sdmerge.bake(TINY / "tiny-base.safetensors", [file_of(tmp_path / "h.pt", made)], output=output)
        name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        key = made[48][0]
        matrix = key["linear"][1].weight.double() @ key["linear"][0].weight.double()
        before = load_file(TINY / "tiny-base.safetensors")[name].double()
        exact = before + before @ matrix
        assert torch.allclose(load_file(output)[name].double(), exact, rtol=2.0**-11, atol=2e-6)
        assert sdmerge.verify(output, inputs=_beside(tmp_path)).identical

    @pytest.mark.parametrize(
        ("chosen", "says"),
        [
            ({"activation_func": "relu"}, "is not linear .the activation relu., so no weights can hold"),
            ({"is_layer_norm": True}, "is not linear .layer norms."),
        ],
    )
    def test_what_is_not_linear_is_refused(self, tmp_path: Path, chosen: dict[str, Any], says: str) -> None:
        path = saved(tmp_path / "h.pt", a1111(chosen, WIDTHS))
        with pytest.raises(RequestError, match=says):
            self.bake(tmp_path, [(path, 1.0)])
        assert not (tmp_path / "folded.safetensors").exists()

    def test_a_width_that_the_model_does_not_read(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "h.pt", a1111({}, (768, 48)))
        with pytest.raises(MismatchError, match=r"no attention layer that reads a width of 768, .*read 32, 48, 64, 72"):
            self.bake(tmp_path, [(path, 1.0)])

    def test_nan_is_named(self, tmp_path: Path) -> None:
        value = a1111({}, (48,))
        value[48][0]["linear.0.weight"][3, 3] = torch.nan
        with pytest.raises(NonFiniteInput, match=r"h.pt: '48.0.linear.0.weight'"):
            self.bake(tmp_path, [(saved(tmp_path / "h.pt", value), 1.0)])

    def test_beside_an_adapter(self, tmp_path: Path) -> None:
        """What changes the same modules is refused; what does not is baked together."""
        path = file_of(tmp_path / "h.pt", pairs(1))
        lora = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
        for module, refused in (("attn2_to_k", True), ("attn2_to_q", False)):
            width = {"attn2_to_k": 48, "attn2_to_q": 72}[module]
            adapter = tmp_path / f"{module}.safetensors"
            save_file(
                {
                    f"{lora}{module}.lora_up.weight": torch.ones(72, 2),
                    f"{lora}{module}.lora_down.weight": torch.ones(2, width),
                },
                str(adapter),
            )
            if refused:
                with pytest.raises(RequestError, match=r"both change unet.mid_block.*bake the adapter first"):
                    self.bake(tmp_path, [(path, 1.0), (adapter, 1.0)])
            else:
                self.bake(tmp_path, [(path, 1.0), (adapter, 1.0)])

    def test_no_transformer_has_them(self, tmp_path: Path) -> None:
        model = toys.saved(tmp_path, "a", 1)
        with pytest.raises(FamilyError, match="for which there are no hypernetworks"):
            sdmerge.bake(
                model, [saved(tmp_path / "h.pt", a1111({}, (6,)))], output=tmp_path / "o.safetensors", family="flux"
            )


def _beside(folder: Path) -> Path:
    """Put the tiny model beside the other inputs."""
    target = folder / "tiny-base.safetensors"
    if not target.exists():
        target.write_bytes((TINY / "tiny-base.safetensors").read_bytes())
    return folder

"""Merged adapters change a model by the sum of what each changes: exactly, or as its best approximation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import sdkernels
from sdformats.safetensors import SafetensorsSource
from sdmerge import adapters
from sdmerge.cli import root
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.lora.strength import parse_strength
from tests.sdmerge.lora.samples import CONV, TE, K, Q, changes, loha, lokr, lora, noise, ranks, relative, saved

MAKERS = {"lora": lora, "loha": loha, "lokr": lokr}
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"


def total(inputs: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, strength in inputs:
        for module, change in changes(path).items() if strength else ():
            found[module] = found.get(module, torch.zeros_like(change)) + strength * change
    return found


def check(out: Path, inputs: list[tuple[Path, float]], tolerance: float = 1e-6) -> None:
    found, expected = changes(out), total(inputs)
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert relative(found[module], change) < tolerance


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(MAKERS)),
            st.sampled_from([1.0, 0.7, -1.3, 0.0, 2.0, -1.0]),
            st.sets(st.sampled_from([K, CONV, TE])).map(lambda found: found | {Q}),
        ),
        min_size=1,
        max_size=3,
    ).filter(lambda found: any(strength for _, strength, _ in found))
)
def test_sums_of_any_mix_are_exact(
    tmp_path_factory: pytest.TempPathFactory, mix: list[tuple[str, float, set[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    inputs = []
    for i, (kind, strength, modules) in enumerate(mix):
        tensors = MAKERS[kind](tuple(sorted(modules)), seed=10 * i)
        inputs.append((saved(folder / f"{i}.safetensors", tensors), strength))
    adapters.merge_lora(inputs, folder / "out.safetensors", to="kohya")
    check(folder / "out.safetensors", inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_exact_where_the_type_would_round(dtype: torch.dtype, to: str, tmp_path: Path) -> None:
    inputs = [
        (saved(tmp_path / f"{i}.safetensors", lora(seed=i, alpha=alpha, dtype=dtype)), strength)
        for i, (alpha, strength) in enumerate(((4, 0.7), (1, -0.3)))
    ]
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    adapters.merge_lora(inputs, out, to=to)
    if to == "peft":
        files = list(out.rglob("adapter_model.safetensors"))
        assert len(files) == 2
        types = [value.dtype for file in files for value in load_file(file).values()]
        assert types.count(torch.float32) == types.count(dtype) == 4
        return
    check(out, inputs)


def test_equal_factors_need_no_arithmetic(tmp_path: Path) -> None:
    inputs = [
        (saved(tmp_path / f"{i}.safetensors", lora((Q,), seed=i, dtype=torch.float16)), s)
        for i, s in ((0, 0.7), (1, -0.7))
    ]
    adapters.merge_lora(inputs, tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", inputs)
    made = load_file(tmp_path / "out.safetensors")
    up, old = made[f"{Q}.lora_up.weight"], [load_file(path)[f"{Q}.lora_up.weight"] for path, _ in inputs]
    assert up.dtype == torch.float16
    assert torch.equal(up, torch.cat([old[0], -old[1]], 1))


@pytest.mark.parametrize("method", ["sum", "svd"])
def test_a_bounded_rank_is_the_best_approximation_of_the_sum(method: Any, tmp_path: Path) -> None:
    makers = (lora(dtype=torch.bfloat16), loha(seed=3), lokr((Q, CONV), seed=5))
    files = [saved(tmp_path / f"{i}.safetensors", made) for i, made in enumerate(makers)]
    inputs = list(zip(files, (1.0, -0.5, 2.0), strict=True))
    out = tmp_path / "out.safetensors"
    adapters.merge_lora(inputs, out, method=method, rank=5, dtype="fp32")
    found = changes(out)
    for module, change in total(inputs).items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        assert relative(found[module], (u[:, :5] * s[:5]) @ vh[:5]) < 2e-6
    assert set(ranks(out).values()) == {5}


@pytest.mark.parametrize(("method", "values"), [("ties", {"density": 0.3}), ("dare", {"density": 0.6, "seed": 7})])
def test_dense_methods_then_the_best_approximation(method: Any, values: dict[str, Any], tmp_path: Path) -> None:
    inputs = [(saved(tmp_path / f"{i}.safetensors", lora(seed=i)), s) for i, s in ((0, 1.0), (1, 0.5))]
    out = tmp_path / "out.safetensors"
    adapters.merge_lora(inputs, out, method=method, parameters=values, rank=40, dtype="fp32", threads=2)
    one, other = changes(inputs[0][0]), changes(inputs[1][0])
    for module, change in changes(out).items():
        deltas = [one[module].float(), 0.5 * other[module].float()]
        if method == "ties":
            base = torch.zeros_like(deltas[0])
            edges = [
                delta.abs().flatten().sort(descending=True).values[int(0.3 * delta.numel()) - 1] for delta in deltas
            ]
            expected = sdkernels.ties.merge(base, deltas, [1.0, 1.0], [edge * (1 - 1e-6) for edge in edges])
        else:
            keys = [sdkernels.philox.key(7, f"{module}#{i}") for i in range(2)]
            expected = sum(sdkernels.dropout.drop(delta, 0.6, key) for delta, key in zip(deltas, keys, strict=True))
        u, s, vh = torch.linalg.svd(torch.as_tensor(expected).double(), full_matrices=False)
        assert relative(change, (u[:, :40] * s[:40]) @ vh[:40]) < 1e-3  # an element at the edge may go either way
    again = tmp_path / "again" / "out.safetensors"
    again.parent.mkdir()
    adapters.merge_lora(inputs, again, method=method, parameters=values, rank=40, dtype="fp32", threads=1)
    assert again.read_bytes() == out.read_bytes()


def test_differences_norms_and_biases_are_summed(tmp_path: Path) -> None:
    def parts(seed: int) -> dict[str, torch.Tensor]:
        return lora(seed=seed) | {
            f"{NORM}.w_norm": noise(36, seed=seed, dtype=torch.float32),
            f"{NORM}.b_norm": noise(36, seed=seed + 1, dtype=torch.float32),
        }

    second = parts(9)
    for key in [key for key in second if key.startswith(TE)]:
        del second[key]
    second[f"{TE}.diff"] = noise(64, 48, seed=4, dtype=torch.float32)
    inputs = [(saved(tmp_path / "a.safetensors", parts(1)), 0.5), (saved(tmp_path / "b.safetensors", second), -2.0)]
    adapters.merge_lora(inputs, tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", inputs)
    made, old = load_file(tmp_path / "out.safetensors"), [load_file(path) for path, _ in inputs]
    expected = 0.5 * old[0][f"{NORM}.b_norm"] - 2 * old[1][f"{NORM}.b_norm"]
    assert torch.allclose(made[f"{NORM}.b_norm"], expected, atol=1e-7)
    adapters.merge_lora(inputs, tmp_path / "small.safetensors", rank=2)
    assert torch.allclose(changes(tmp_path / "small.safetensors")["te1.text_model.encoder.layers.0.mlp.fc1"],
                          total(inputs)["te1.text_model.encoder.layers.0.mlp.fc1"], atol=1e-6)  # fmt: skip


def test_embeddings_are_kept_and_may_not_clash(tmp_path: Path) -> None:
    def bundle(word: str) -> dict[str, torch.Tensor]:
        return loha((Q,)) | {f"bundle_emb.{word}.string_to_param.*": noise(2, 768, seed=3, dtype=torch.float32)}

    a, b, c = (saved(tmp_path / f"{i}.safetensors", bundle(word)) for i, word in enumerate(("cat", "dog", "cat")))
    adapters.merge_lora([a, b], tmp_path / "out.safetensors")
    assert {key for key in load_file(tmp_path / "out.safetensors") if "bundle" in key} == {
        "bundle_emb.cat.string_to_param.*",
        "bundle_emb.dog.string_to_param.*",
    }
    with pytest.raises(RequestError, match="'cat'"):
        adapters.merge_lora([a, c], tmp_path / "no.safetensors")


def test_metadata_tells_what_was_done_and_nothing_of_training(tmp_path: Path) -> None:
    texts = {"ss_base_model_version": "sd_v1", "ss_tag_frequency": "{}", "ss_training_started_at": "1"}
    a = saved(tmp_path / "a.safetensors", lora(rank=3), **texts)
    b = saved(tmp_path / "b.safetensors", lora((Q,), rank=2))
    adapters.merge_lora([a, (b, 0.5)], tmp_path / "out.safetensors")
    with SafetensorsSource(tmp_path / "out.safetensors") as made:
        found = dict(made.metadata)
    assert json.loads(found.pop("sdmerge.merge_lora")) == {"method": "sum", "strengths": [1.0, 0.5]}
    assert found.pop("ss_base_model_version") == "sd_v1"
    assert found["ss_network_dim"] == "Dynamic"
    assert (found["modelspec.title"], found["modelspec.architecture"]) == ("out", "stable-diffusion-v1/lora")
    assert not {"ss_tag_frequency", "ss_training_started_at"} & found.keys()


def test_refusals(tmp_path: Path) -> None:
    a, out = saved(tmp_path / "a.safetensors", lora()), tmp_path / "out.safetensors"
    wide = {f"{K}.lora_up.weight": torch.ones(40, 2), f"{K}.lora_down.weight": torch.ones(2, 1024)}
    odd = {f"{Q}.lora_up.weight": torch.ones(40, 2), f"{Q}.lora_down.weight": torch.ones(2, 47)}
    for tensors, error in ((wide, FamilyError), (odd, MismatchError)):
        with pytest.raises(error):
            adapters.merge_lora([a, saved(tmp_path / "b.safetensors", tensors)], out)
    with pytest.raises(RequestError, match="other than 0"):
        adapters.merge_lora([(a, 0.0)], out)
    with pytest.raises(RequestError, match="ties needs a bound"):
        adapters.merge_lora([a, a], out, method="ties")
    with pytest.raises(RequestError, match="no parameters"):
        adapters.merge_lora([a, a], out, parameters={"density": 1})
    assert not out.exists()


def test_strengths_are_read_from_behind_the_last_colon(tmp_path: Path) -> None:
    assert parse_strength("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_strength("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    assert parse_strength("C:\\loras\\a.safetensors") == (Path("C:\\loras\\a.safetensors"), 1.0)
    assert parse_strength("C:\\a.safetensors:1e-1") == (Path("C:\\a.safetensors"), 0.1)
    assert parse_strength("a:nan") == (Path("a:nan"), 1.0)
    assert parse_strength(":1") == (Path(":1"), 1.0)
    (tmp_path / "a:1").touch()
    assert parse_strength(f"{tmp_path}/a:1") == (tmp_path / "a:1", 1.0)


def test_the_command(tmp_path: Path) -> None:
    a, b = (saved(tmp_path / f"{i}.safetensors", lora(seed=i)) for i in range(2))
    out = tmp_path / "out.safetensors"
    arguments = ["merge-lora", f"{a}:0.5", str(b), "-o", str(out)]
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code == 0, result.output
    check(out, [(a, 0.5), (b, 1.0)])
    more = ["--method", "ties", "-p", "density=0.4", "--rank", "4", "--overwrite"]
    assert CliRunner().invoke(root, [*arguments, *more]).exit_code == 0
    assert set(ranks(out).values()) == {4}

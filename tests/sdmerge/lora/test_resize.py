"""Resized adapters against torch's SVD of the whole change in float64."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

from sdformats.errors import FormatError, OutputExists
from sdformats.safetensors import SafetensorsSource
from sdmerge import adapters
from sdmerge.cli import root
from sdmerge.errors import NonFiniteInput, RequestError
from tests.sdmerge.lora.samples import Q, changes, loha, lokr, lora, noise, ranks, relative, saved

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

KINDS = {
    "lora": lora(),
    "large rank": lora(rank=30),
    "bf16": lora(dtype=torch.bfloat16),
    "fp64": lora(dtype=torch.float64),
    "loha": loha(),
    "lokr": lokr(),
}


def best(change: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_equals_the_truncated_svd(kind: str, rank: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "in.safetensors", KINDS[kind])
    to = "kohya" if kind.startswith("lo") and kind != "lora" else None
    adapters.resize_lora(
        source, tmp_path / "out.safetensors", rank=rank, dtype="fp32", to=to, report=tmp_path / "r.json"
    )
    found, before = changes(tmp_path / "out.safetensors"), changes(source)
    report = json.loads((tmp_path / "r.json").read_text())["layers"]
    assert found.keys() == before.keys()
    for path, change in before.items():
        expected = best(change, rank)
        assert relative(found[path], expected) < 2e-6
        assert report[path]["error"] == pytest.approx(float((change - expected).norm() / change.norm()), rel=1e-6)
    assert set(ranks(tmp_path / "out.safetensors").values()) == {rank}


def test_keeps_type_layout_and_what_is_true_of_it(tmp_path: Path) -> None:
    texts = {"ss_network_dim": "8", "ss_network_alpha": "4", "ss_tag_frequency": "{}", "sshs_model_hash": "0"}
    source = saved(tmp_path / "in.safetensors", lora(dtype=torch.float16), **texts)
    adapters.resize_lora(source, tmp_path / "out.safetensors", rank=2)
    with SafetensorsSource(tmp_path / "out.safetensors") as made, SafetensorsSource(source) as old:
        assert made.specs.keys() == old.specs.keys()
        assert {str(spec.dtype) for spec in made.specs.values()} == {str(spec.dtype) for spec in old.specs.values()}
        found = dict(made.metadata)
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_tag_frequency"]) == ("2", "2", "{}")
    assert json.loads(found["sdmerge.resize_lora"]) == {"rank": 2}
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert found["sshs_model_hash"] != "0", "the hash of the new bytes"
    assert str(tmp_path) not in str(found)


@pytest.mark.parametrize("size", [9_000, 20_000, 60_000])
def test_a_size_is_filled_and_never_exceeded(size: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "in.safetensors", lora(rank=16), note="x" * 100)
    adapters.resize_lora(source, tmp_path / "out.safetensors", size=size)
    assert size - 4 * (40 + 768) - 300 <= (tmp_path / "out.safetensors").stat().st_size <= size
    adapters.resize_lora(source, tmp_path / "peft", size=size, to="peft")
    assert sum(file.stat().st_size for file in (tmp_path / "peft").rglob("*.*")) <= size
    with pytest.raises(RequestError, match="no module has a place"):
        adapters.resize_lora(source, tmp_path / "no.safetensors", size=300)


def test_energy_and_error_bound_each_module(tmp_path: Path) -> None:
    source, out = saved(tmp_path / "in.safetensors", lora(rank=16)), tmp_path / "out.safetensors"
    adapters.resize_lora(source, out, error=0.4)
    for path, change in changes(source).items():
        rank = ranks(out)[path]
        assert rank is not None
        assert relative(changes(out)[path], change) <= 0.4 < relative(best(change, rank - 1), change)
    adapters.resize_lora(source, out, energy=0.84, overwrite=True)
    assert all(relative(changes(out)[path], change) ** 2 <= 0.16 for path, change in changes(source).items())
    with SafetensorsSource(out) as made:
        assert made.metadata["ss_network_dim"] == "Dynamic"


def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    source = saved(tmp_path / "in.safetensors", lora(rank=16, dtype=torch.float16))
    made = []
    for threads in (1, 2, 5):
        out = tmp_path / str(threads) / "out.safetensors"
        out.parent.mkdir()
        adapters.resize_lora(source, out, size=30_000, threads=threads)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]


def test_differences_are_kept(tmp_path: Path) -> None:
    norm = {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": noise(36, seed=1, dtype=torch.float32)}
    source = saved(tmp_path / "in.safetensors", lora() | norm)
    report = adapters.resize_lora(source, tmp_path / "out.safetensors", rank=2)
    path = "unet.down_blocks.0.resnets.0.norm1"
    assert torch.equal(changes(tmp_path / "out.safetensors")[path], changes(source)[path])
    assert any("kept whole" in note for note in report.notes)


def test_an_untrained_module_stays_nothing(tmp_path: Path) -> None:
    tensors = lora((Q,), rank=4)
    tensors[f"{Q}.lora_up.weight"].zero_()
    out = tmp_path / "out.safetensors"
    adapters.resize_lora(saved(tmp_path / "in.safetensors", tensors), out, rank=2)
    assert not next(iter(changes(out).values())).any()
    assert set(ranks(out).values()) == {2}


def test_refuses_what_has_no_factors(tmp_path: Path) -> None:
    dora = lora((Q,)) | {f"{Q}.dora_scale": torch.ones(40, 1)}
    source, out = saved(tmp_path / "in.safetensors", dora), tmp_path / "out.safetensors"
    with pytest.raises(RequestError, match="is DoRA.*bake it, then extract"):
        adapters.resize_lora(source, out, rank=2)
    broken = lora((Q,))
    broken[f"{Q}.lora_up.weight"][0] = torch.nan
    with pytest.raises(NonFiniteInput, match="to_q"):
        adapters.resize_lora(saved(source, broken), out, rank=2)
    with pytest.raises(RequestError, match="give one of rank"):
        adapters.resize_lora(source, out)
    with pytest.raises(FormatError, match="only read"):
        adapters.resize_lora(saved(source, lora((Q,))), out, rank=2, to="cloneofsimo-list")
    assert not out.exists()


def test_the_command(tmp_path: Path) -> None:
    source, out = saved(tmp_path / "in.safetensors", lora()), tmp_path / "out.safetensors"
    arguments = ["resize-lora", str(source), "-o", str(out), "--size", "20kB", "--report", str(tmp_path / "r.json")]
    result = CliRunner().invoke(root, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"]
    assert out.stat().st_size <= 20_000
    assert json.loads((tmp_path / "r.json").read_text())["layers"]
    dry = CliRunner().invoke(root, ["resize-lora", str(source), "-o", str(tmp_path / "x"), "--rank", "2", "--dry-run"])
    assert "expected a name that ends in .safetensors" in str(dry.exception)


def test_the_picture_is_painted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    norm = {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": noise(36, seed=1, dtype=torch.float32)}
    source, plot = saved(tmp_path / "in.safetensors", lora() | norm), tmp_path / "r.png"
    adapters.resize_lora(source, tmp_path / "out.safetensors", rank=2, plot=plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExists, match=r"r\.png"):
        adapters.resize_lora(source, tmp_path / "other.safetensors", rank=2, plot=plot)
    assert not (tmp_path / "other.safetensors").exists()

"""What extraction, resizing and merging are asked for and cannot do is told in one line, before there is work to lose."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdmerge
from sdformats.adapters.errors import CannotHold
from sdformats.errors import OutputExists, WriteError
from sdmerge.errors import MismatchError, NonFiniteInput, RequestError
from tests.sdmerge import toys
from tests.sdmerge.lora import samples
from tests.sdmerge.lora.test_extract import CONV, FC1, PATHS, TO_Q, models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdmerge.lora.combine import How


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tuned.safetensors", "base.safetensors", "in.safetensors"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"clamp": 2.0}, "clamp is 2"),
        ({"clamp": 0.0}, "clamp is 0"),
        ({"clamp": math.nan}, "clamp is nan"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": math.inf}, "tolerance is inf"),
        ({"conv_rank": 0}, "conv_rank is 0"),
        ({"conv_rank": 2, "size": "1MB"}, "conv_rank goes with a rank, and size"),
        ({"conv_rank": 2, "energy": 0.5}, "conv_rank goes with a rank, and energy"),
        ({"ema": "use"}, "ema is use, and plain weights are extracted"),
    ],
)
def test_numbers_out_of_range_are_refused(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    with pytest.raises(RequestError, match=said):
        sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", family="sd1", **asked)
    assert not left(tmp_path)


def _extract(folder: Path, out: Path, **more: Any) -> None:
    sdmerge.extract_lora(folder / "tuned.safetensors", folder / "base.safetensors", out, family="sd1", **more)


def _resize(folder: Path, out: Path, **more: Any) -> None:
    sdmerge.resize_lora(folder / "in.safetensors", out, rank=2, **more)


def _merge(folder: Path, out: Path, **more: Any) -> None:
    sdmerge.merge_lora([folder / "in.safetensors"], out, **more)


@pytest.mark.parametrize("do", [_extract, _resize, _merge])
def test_places_that_cannot_be_written_to_are_refused_before_the_work(
    do: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path)
    samples.saved(tmp_path / "in.safetensors", samples.lora())
    out, given = tmp_path / "l.safetensors", tmp_path / ("tuned.safetensors" if do is _extract else "in.safetensors")
    before = given.read_bytes()
    for name, end in (("report", ""), ("plot", ".png")):
        with pytest.raises(RequestError, match=r"l\.safetensors: is to be written twice"):
            do(tmp_path, out, **{name: out})
        with pytest.raises(RequestError, match="is an input"):
            do(tmp_path, out, overwrite=True, **{name: given})
        with pytest.raises(WriteError, match=r"the folder .*nowhere does not exist; create it first"):
            do(tmp_path, out, **{name: tmp_path / "nowhere" / f"r{end}"})
        with pytest.raises(RequestError, match="is a folder"):
            do(tmp_path, out, **{name: tmp_path})
    with pytest.raises(RequestError, match="is to be written twice"):
        do(tmp_path, out, report=tmp_path / "r.png", plot=tmp_path / "r.png")
    with pytest.raises(RequestError, match=r"r\.jpg: the picture of ranks is a PNG picture"):
        do(tmp_path, out, plot=tmp_path / "r.jpg")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(RequestError, match=r"ranks is drawn by matplotlib.*sdmerge\[demo\]"):
            do(tmp_path, out, plot=tmp_path / "r.png")
    with pytest.raises(WriteError, match=r"nowhere does not exist"):
        do(tmp_path, tmp_path / "nowhere" / "l.safetensors")
    assert given.read_bytes() == before
    assert not left(tmp_path)


def test_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    models(tmp_path)
    out = tmp_path / "l.safetensors"
    with pytest.raises(RequestError, match="is to be written twice"):
        _extract(tmp_path, out, also={out: "1MB"})
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(OutputExists):
        _extract(tmp_path, out, also={tmp_path / "m.safetensors": "1MB"})
    assert left(tmp_path) == {"m.safetensors"}


def test_names_and_layouts_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    tuned, _, _ = models(tmp_path)
    tensors = load_file(tuned)
    tensors[TO_Q][0, 0] = math.nan  # an error of its own, were it read
    save_file(tensors, tuned)
    with pytest.raises(RequestError, match=r"l\.ckpt: cannot be written"):
        _extract(tmp_path, tmp_path / "l.ckpt", rank=1)
    with pytest.raises(RequestError, match="this layout is a folder"):
        _extract(tmp_path, tmp_path / "l.safetensors", rank=1, to="peft")
    with pytest.raises(CannotHold, match="is for sd1, which the layout xlabs"):
        _extract(tmp_path, tmp_path / "l.safetensors", rank=1, to="xlabs")
    with pytest.raises(NonFiniteInput, match=r"tuned\.safetensors: .*attn1\.to_q\.weight': holds NaN or infinity"):
        _extract(tmp_path, tmp_path / "l.safetensors", rank=1)


def test_only_options_that_there_are_are_named(tmp_path: Path) -> None:
    models(tmp_path)
    with pytest.raises(CannotHold, match="1 module has locon.*these layouts hold all of it") as caught:
        _extract(tmp_path, tmp_path / "l.safetensors", rank=1, to="diffusers-old")
    assert "--allow-loss" not in str(caught.value)
    assert "--as" not in str(caught.value)


def test_layers_without_room_are_named_and_count_as_error(tmp_path: Path) -> None:
    tuned, base, changes = models(tmp_path)
    report, also = tmp_path / "r.json", tmp_path / "small.safetensors"
    large = sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, report=report, family="sd1")[0]
    size = (tmp_path / "l.safetensors").stat().st_size
    assert not any("no room" in note for note in large.notes)
    small = sdmerge.extract_lora(
        *(tuned, base, tmp_path / "s.safetensors"), size=size * 3 // 4, report=tmp_path / "s.json", family="sd1"
    )[0]
    told = json.loads((tmp_path / "s.json").read_text())
    names = {PATHS[name]: change for name, change in changes.items()}
    out = {path for path, one in told["layers"].items() if one["rank"] == 0}
    assert out
    assert out == {path for path in names if any("no room" in note and path in note for note in small.notes)}
    assert told["layers"].keys() == names.keys()
    norms = {path: float(change.norm()) for path, change in names.items()}
    left = math.hypot(*(norms[path] * one["error"] for path, one in told["layers"].items()))
    assert math.isclose(told["error"], left / math.hypot(*norms.values()), rel_tol=1e-4)
    assert told["error"] > 0.05
    both = sdmerge.extract_lora(
        tuned, base, tmp_path / "b.safetensors", rank=2, also={also: size * 3 // 4}, family="sd1"
    )
    assert both[0].notes == large.notes
    assert both[1].notes == small.notes


def test_bounds_of_a_smaller_output_are_its_own(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = toys.toy(1)
    tuned = {name: t + torch.randn(t.shape) * 0.1 if name in (TO_Q, CONV, FC1) else t for name, t in base.items()}
    files = toys.save(tmp_path / "tuned.safetensors", tuned), toys.save(tmp_path / "base.safetensors", base)
    report = tmp_path / "r.json"
    sdmerge.extract_lora(
        *files,
        tmp_path / "l.safetensors",
        rank=1,
        also={tmp_path / "m.safetensors": "1MB"},
        report=report,
        family="sd1",
    )
    for name, path in PATHS.items():
        told = json.loads(report.read_text())["layers"][path]
        sigma = torch.linalg.svdvals((tuned[name] - base[name]).double().flatten(1))
        best = float(sigma[1:].norm() / sigma.norm())
        assert math.isclose(told["error"], best, rel_tol=1e-3)
        assert told["error"] <= best * (1 + told["excess_at_most"]) * (1 + 1e-5)


def test_modules_of_one_model_alone_are_named(tmp_path: Path) -> None:
    tuned, base, _ = models(tmp_path)
    tensors = load_file(base)
    del tensors[FC1]
    save_file(tensors, base)
    notes = sdmerge.extract_lora(tuned, base, tmp_path / "l.safetensors", rank=2, family="sd1")[0].notes
    assert f"in tuned.safetensors alone, so nothing to compare: {PATHS[FC1]}" in notes


def test_a_rank_does_not_grow(tmp_path: Path) -> None:
    lora = samples.saved(tmp_path / "in.safetensors", samples.lora(rank=30))
    sdmerge.resize_lora(lora, tmp_path / "l.safetensors", rank=36)
    assert set(samples.ranks(tmp_path / "l.safetensors").values()) == {30}


def test_an_adapter_of_zeros_has_nothing_for_a_size(tmp_path: Path) -> None:
    tensors = {name: t * 0 if "lora_up" in name else t for name, t in samples.lora().items()}
    lora = samples.saved(tmp_path / "in.safetensors", tensors)
    with pytest.raises(RequestError, match="all changes are zeros"):
        sdmerge.resize_lora(lora, tmp_path / "l.safetensors", size="1MB")
    sdmerge.resize_lora(lora, tmp_path / "l.safetensors", rank=2)
    assert not any(change.any() for change in samples.changes(tmp_path / "l.safetensors").values())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    _, base, _ = models(tmp_path)
    lora = samples.saved(tmp_path / "in.safetensors", samples.lora())
    with pytest.raises(MismatchError, match=r"in\.safetensors: has no module in common with .*base\.safetensors"):
        sdmerge.extract_lora(lora, base, tmp_path / "l.safetensors", family="sd1")


@pytest.mark.parametrize(
    ("method", "said"), [("svd", "kept whole"), ("ties", "kept whole, a sum: ties merges factors alone")]
)
def test_what_a_method_does_not_merge_is_told(method: How, said: str, tmp_path: Path) -> None:
    whole = {f"{samples.Q}.diff": torch.ones(40, 48)}
    files = [samples.saved(tmp_path / f"{i}.safetensors", samples.lora((samples.K,)) | whole) for i in range(2)]
    notes = sdmerge.merge_lora(files, tmp_path / "l.safetensors", method=method, rank=2, to="lycoris").notes
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert f"a difference, {said}: {path}" in notes
    assert samples.changes(tmp_path / "l.safetensors")[path].eq(2).all()


def test_a_report_tells_modules_in_the_order_of_the_adapter(tmp_path: Path) -> None:
    tensors = samples.lora()
    tensors[f"{samples.Q}.lora_up.weight"] *= 1e-6
    lora = samples.saved(tmp_path / "in.safetensors", tensors)
    report = tmp_path / "r.json"
    sdmerge.resize_lora(lora, tmp_path / "l.safetensors", size=lora.stat().st_size // 2, report=report)
    layers = json.loads(report.read_text())["layers"]
    assert list(layers) == list(samples.changes(lora))
    assert [one["rank"] == 0 for one in layers.values()].count(True) == 1
    assert list(layers.values())[-1]["rank"] > 0

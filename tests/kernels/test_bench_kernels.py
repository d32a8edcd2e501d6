"""The kernels' benchmark: what it times, what it writes, what it refuses. No speed is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from click.testing import CliRunner

from benchmarks import bench_kernels
from benchmarks.bench_kernels import Timing, main
from sdkernels import lerp, linear, philox

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_share_is_of_the_copys_speed() -> None:
    timing = Timing("k", "c", 1000, {"copy": [1.0, 2.0, 9.0], "fast": [4.0], "plain": []})
    assert timing.share("fast") == 0.5
    assert timing.share("plain") is None
    assert timing.share("reference") is None
    assert timing.to_json()["versions"]["fast"] == {"median_seconds": 4.0, "seconds": [4.0], "of_copy": 0.5}


def test_versions_run_by_turns_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    timing = Timing("k", "c", 1)
    calls: bench_kernels.Contenders = {name: partial(order.append, name) for name in ("copy", "reference")}
    bench_kernels.measure(timing, calls, 3, torch.device("cpu"))
    assert order == ["copy", "reference"] * (3 + bench_kernels.WARM_UP)
    assert {name: len(runs) for name, runs in timing.seconds.items()} == {"copy": 3, "reference": 3}


def test_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench_kernels, "kernels", lambda: iter((linear.combine, lerp.blend, philox.uniform)))
    command = ["--device", "cpu", "--size", "1", "--rounds", "2", "--json", str(tmp_path / "k.json")]
    try:
        done = CliRunner().invoke(main, [*command, "--kernel", "linear.combine", "--kernel", "philox.uniform"])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert [one["kernel"] for one in found["kernels"]] == ["linear.combine", "philox.uniform"]
    assert set(found["kernels"][0]["versions"]) == {"copy", "reference", "plain"}
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["processor"]
    assert "linear.combine" in done.output


def test_unknown_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "kernels", lambda: iter((linear.combine,)))
    done = CliRunner().invoke(main, ["--device", "cpu", "--kernel", "linear.combin"])
    assert done.exit_code == 2
    assert "linear.combine" in done.output


def test_kernel_without_a_large_case_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = replace(linear.combine, name="linear.bare", large=None)
    monkeypatch.setattr(bench_kernels, "kernels", lambda: iter((bare,)))
    done = CliRunner().invoke(main, ["--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "k.json")])
    assert done.exit_code == 0, done.output
    assert "linear.bare" in done.output
    assert json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))["kernels"] == []

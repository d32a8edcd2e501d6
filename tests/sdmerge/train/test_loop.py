"""The loop: the same weights from the same seed, however often it is stopped, and on any number of devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdformats.errors import OutputExists, WriteError
from sdmerge.errors import RequestError
from sdmerge.train import checkpoint
from tests.sdmerge.train import runs

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {"rank": 2, "targets": "attention", "lr": 1e-2, "batch": 2}


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_was_stopped_ends_with_the_same_weights(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    values = SMALL | {"steps": 7, "accumulate": 2, "ema": 0.9, "schedule": "cosine", "warmup": 2, "flip": True}
    values |= {"caption_dropout": 0.3, "shuffle_captions": True, "noise_offset": 0.1, "text_encoder": True}
    straight = tmp_path / "straight.safetensors"
    runs.trained("lora", toy, diamonds, straight, **values)
    halting = tmp_path / "halting.safetensors"
    for stop in (3, 5):
        run = runs.new("lora", toy, diamonds, halting, save_every=2, resume=True, **values)
        run.method.__dict__["after_step"] = _stopping(run, stop)
        with pytest.raises(KeyboardInterrupt):
            run.go()
        assert not halting.exists()
    run = runs.trained("lora", toy, diamonds, halting, save_every=2, resume=True, **values)
    assert "going on after step 4" in run.tell.notes  # type: ignore[attr-defined]
    assert same(straight, halting)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    with Image.open(run.folder / "loss.png") as curve:
        assert curve.size > (400, 200)


def _stopping(run: Any, step: int) -> Any:
    def after_step(_trained: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    return after_step


def test_killed_and_resumed_by_command(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    args = [
        "lora",
        "--model",
        str(toy),
        "--data",
        str(diamonds),
        "--rank",
        "2",
        "--targets",
        "attention",
        "--lr",
        "0.01",
    ]
    args += ["--batch", "2", "--steps", "6", "--save-every", "1", "--device", "cpu"]
    straight, killed = tmp_path / "straight.safetensors", tmp_path / "killed.safetensors"
    command = [sys.executable, "-m", "sdmerge.train", *args]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums in two threads round otherwise
    runs.trained("lora", toy, diamonds, straight, steps=6, **SMALL)
    child = subprocess.Popen([*command, "-o", str(killed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=alone)
    folder = tmp_path / "killed.safetensors.run"
    while not checkpoint.states(folder) and child.poll() is None:
        os.sched_yield()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if not killed.exists():
        done = subprocess.run(
            [*command, "-o", str(killed), "--resume"], env=alone, check=True, capture_output=True, text=True
        )
        assert "going on after step" in done.stderr
    assert same(straight, killed)


def test_two_processes_do_what_one_does(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    runs.trained("lora", toy, diamonds, one, steps=3, **SMALL | {"batch": 4})
    args = ["--model", str(toy), "--data", str(diamonds), "--rank", "2", "--targets", "attention", "--lr", "0.01"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "sdmerge.train"]
    done = subprocess.run(
        [*launch, "lora", *args, "--batch", "2", "--steps", "3", "--device", "cpu", "-o", str(two)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Adam makes a whole step of a gradient that is all rounding, so losses are compared, not weights.
    first, second = (losses(tmp_path / f"{name}.safetensors.run") for name in ("one", "two"))
    assert first == pytest.approx(second, rel=1e-4)
    assert done.stderr.count("two.safetensors: ") == 1


def losses(folder: Path) -> list[float]:
    """Return what a run's log says, step by step."""
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_full_disk_keeps_the_last_state(
    toy: Path, diamonds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o.safetensors"
    run = runs.new("lora", toy, diamonds, output, steps=6, save_every=2, **SMALL)
    plain = checkpoint.SafetensorsSink.write

    def full(self: Any, name: str, offset: int, buffer: memoryview) -> None:
        if "state-00000004" in self.path.name:
            raise WriteError("cannot be written: No space left on device", path=self.path)
        plain(self, name, offset, buffer)

    monkeypatch.setattr(checkpoint.SafetensorsSink, "write", full)
    seen = []
    run.method.__dict__["after_step"] = lambda _: seen.append([path.name for path in checkpoint.states(run.folder)])
    run.go()
    assert seen[4] == seen[5] == ["state-00000002.safetensors"]
    assert [path.name for path in checkpoint.states(run.folder)] == ["state-00000006.safetensors"]
    assert "No space left" in run.tell.warnings[0]  # type: ignore[attr-defined]


def test_other_settings_or_data_are_no_continuation(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    runs.trained("lora", toy, diamonds, output, steps=2, save_every=2, **SMALL)
    with pytest.raises(OutputExists):
        runs.trained("lora", toy, diamonds, output, steps=3, **SMALL)
    output.unlink()
    with pytest.raises(OutputExists, match="--resume"):
        runs.trained("lora", toy, diamonds, output, steps=3, **SMALL)
    with pytest.raises(RequestError, match="rank 2, not 3"):
        runs.trained("lora", toy, diamonds, output, steps=3, resume=True, **SMALL | {"rank": 3})
    run = runs.trained("lora", toy, diamonds, output, steps=3, resume=True, **SMALL)
    assert "going on after step 2" in run.tell.notes  # type: ignore[attr-defined]


def test_checkpointing_and_mixed_precision(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    plain, saving = tmp_path / "plain.safetensors", tmp_path / "saving.safetensors"
    runs.trained("lora", toy, diamonds, plain, steps=2, **SMALL)
    runs.trained("lora", toy, diamonds, saving, steps=2, checkpointing=True, **SMALL)
    assert same(plain, saving)
    run = runs.trained("lora", toy, diamonds, tmp_path / "b.safetensors", steps=2, precision="bf16", **SMALL)
    assert run.networks.unet.dtype == torch.bfloat16
    first, second = load_file(plain), load_file(tmp_path / "b.safetensors")
    assert all(one.dtype == torch.float32 for one in second.values())
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 0.05


def test_exports_on_the_way(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    runs.trained("lora", toy, diamonds, tmp_path / "o.safetensors", steps=4, export_every=2, **SMALL)
    runs.trained("lora", toy, diamonds, tmp_path / "p.safetensors", steps=2, **SMALL)
    assert same(tmp_path / "o-000002.safetensors", tmp_path / "p.safetensors")


def test_tensorboard_reads_the_losses_of_a_run_that_was_resumed(toy: Path, diamonds: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "o.safetensors"
    run = runs.trained("lora", toy, diamonds, output, steps=3, save_every=2, keep=2, **SMALL)
    assert_board(accumulators, run.folder, [1, 2, 3])
    output.unlink()
    (run.folder / "state-00000003.safetensors").unlink()
    runs.trained("lora", toy, diamonds, output, steps=4, resume=True, **SMALL)
    assert_board(accumulators, run.folder, [1, 2, 3, 4])


def assert_board(accumulators: Any, folder: Path, steps: list[int]) -> None:
    """Have TensorBoard's own reader read what a run left, and compare it with the run's log."""
    found = accumulators.EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = found.Scalars("loss")
    assert [one.step for one in scalars] == steps
    assert [one.value for one in scalars] == pytest.approx(losses(folder), rel=1e-6)

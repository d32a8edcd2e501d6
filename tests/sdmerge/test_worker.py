"""How much whole tensors may take, and where a run computes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from sdformats.tensor import DType, Spec
from sdmerge import run
from sdmerge.options import Options
from sdmerge.step import Step


def step(*, whole: bool) -> Step:
    return Step("x", Spec((1 << 16,), DType.F32), (), lambda tensors, _start: tensors[0], whole)


def test_room_bounds_what_is_held_and_lets_everyone_in() -> None:
    room = run._Room(100)
    held: list[int] = []
    peaks: list[int] = []
    done: list[int] = []
    lock = threading.Lock()
    inside = threading.Semaphore(0)

    def take(size: int) -> None:
        with room(size):
            with lock:
                held.append(size)
                peaks.append(sum(held))
            inside.release()
            with lock:
                held.remove(size)
                done.append(size)

    sizes = [40, 100, 40, 40, 20, 100, 5]
    threads = [threading.Thread(target=take, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(done) == sorted(sizes)
    assert max(peaks) <= 100


def test_a_large_one_is_not_passed_by_small_ones_for_ever() -> None:
    room = run._Room(100)
    order: list[str] = []
    ready = threading.Event()

    def wait_large() -> None:
        with room(100):
            order.append("large")

    with room(60):
        large = threading.Thread(target=wait_large)
        large.start()
        while not room._waiting:
            pass

        def take_small() -> None:
            with room(10):
                order.append("small")
                ready.set()

        small = threading.Thread(target=take_small)
        small.start()
        assert not ready.wait(0.05)
    large.join(10)
    small.join(10)
    assert order == ["large", "small"]


def plan(*steps: Step) -> Any:
    class Steps:
        pass

    found = Steps()
    found.steps = steps  # type: ignore[attr-defined]
    found.cost = sum(one.cost for one in steps)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("whole", "there", "picked"), [(True, True, "cuda"), (False, True, "cpu"), (True, False, "cpu")]
)
def test_auto_takes_a_gpu_for_whole_tensors_only(
    monkeypatch: pytest.MonkeyPatch, whole: bool, there: bool, picked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert run.pick_device(Options(), [plan(step(whole=whole))]).type == picked

"""Time and memory of one call, taken inside the process that makes it.

A peer's interpreter runs this too: nothing but the standard library is needed.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_RESET = Path("/proc/self/clear_refs")
_FIELDS = {"RssAnon": "anonymous", "VmRSS": "resident", "VmHWM": "peak"}


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one call cost.

    Args:
        seconds: wall time.
        anonymous: peak anonymous memory in bytes over the idle process; None where the system does not tell.
        resident: peak resident memory in bytes over the idle process; None where the system does not tell.
    """

    seconds: float
    anonymous: int | None
    resident: int | None


def measure(call: Callable[[], object], *, interval: float = 0.01) -> Measurement:
    """Make the call once and return what it cost.

    Args:
        call: what to measure; what it raises goes through.
        interval: seconds between two looks at the memory, where the system shows it.
    """
    gc.collect()
    if not _memory():
        return _measure_coarsely(call)
    exact = _reset_peak()
    idle = _memory()
    peaks = dict(idle)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peaks, done, interval), daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        call()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    resident = peaks["peak"] if exact else peaks["resident"]
    return Measurement(seconds, peaks["anonymous"] - idle["anonymous"], resident - idle["resident"])


def touch_free_memory(folder: Path, size: int) -> None:
    """Have free memory for `size` bytes of output ready, or for as much of it as memory is free now.

    A virtual machine hands memory that lies idle back to its host, and the first write to it is then several times
    slower. A tool that takes longer to import would be measured with more of such memory. So that all start alike,
    a scratch file is written and removed right before the clock starts; the disk is idle again when it does. Does nothing
    where there is no /proc.
    """
    block = bytes(1 << 20)
    scratch = folder / "scratch.bin"
    with scratch.open("wb", buffering=0) as file:
        for _ in range(min(size, _free_memory()) // len(block)):
            file.write(block)
    scratch.unlink()
    if hasattr(os, "sync"):
        os.sync()


def _free_memory() -> int:
    """Return the bytes of memory that hold nothing at all, not even a cached file."""
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemFree"].split()[0]) << 10


def _watch(peaks: dict[str, int], done: threading.Event, interval: float) -> None:
    waiting = True
    while waiting:
        waiting = not done.wait(interval)
        for name, value in _memory().items():
            peaks[name] = max(peaks[name], value)


def _memory() -> dict[str, int]:
    """Return current memory in bytes, or nothing where there is no /proc with these fields."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value.split()[0]) << 10
    return found if len(found) == len(_FIELDS) else {}


def _reset_peak() -> bool:
    """Make the kernel's own high-water mark start from here. Without it, imports would count."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _measure_coarsely(call: Callable[[], object]) -> Measurement:
    before = _largest_so_far()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    after = _largest_so_far()
    return Measurement(seconds, None, None if before is None or after is None else after - before)


def _largest_so_far() -> int | None:
    """Return the peak of resident memory since the process began.

    It gives no more than a lower bound for what a call added, but it is all that macOS tells.
    """
    if sys.platform == "win32":
        return None
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def available_cpus() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> dict[str, str | int]:
    """Tell what a reader needs to place the numbers, and nothing that names the machine or its owner."""
    return {
        "cpus": available_cpus(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }

"""What every test may count on."""

from __future__ import annotations

import importlib.util
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sdkernels.native import Library

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a job in a shell's background inherits this, and so would children
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("hypothesis"):  # where the conformance tests run there is none
    from hypothesis import settings

    settings.register_profile("untimed", deadline=None)  # no test asserts a timing
    settings.load_profile("untimed")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The native library, compiled for this run, whether or not the package has one."""
    import torch

    from sdkernels.build import build
    from sdkernels.native import Library

    built = build(tmp_path_factory.mktemp("native"))
    if built is None or not torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        pytest.skip("no C compiler here, or a processor that the library is not for")
    return Library(built)

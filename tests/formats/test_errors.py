"""What an error says."""

from __future__ import annotations

from pathlib import Path

from sdformats.errors import CorruptFile, FormatError, OutputExists, WriteError


def test_an_error_says_what_where_what_else_and_what_next() -> None:
    error = CorruptFile(
        "is broken", path=Path("f.bin"), key="w\x1b\u202e", expected="better", advice="download it again"
    )
    assert str(error) == r"f.bin: 'w\x1b\u202e': is broken (expected better); download it again"
    assert str(FormatError("is broken")) == "is broken"


def test_what_a_file_made_long_is_cut() -> None:
    shown = str(CorruptFile("x" * 10**6, key="k" * 10**6))
    assert len(shown) < 1000
    assert shown.startswith("'kkk")


def test_the_tree() -> None:
    assert issubclass(OutputExists, WriteError)
    assert issubclass(WriteError, FormatError)

"""The only place that prints. Results go to standard output, everything said about them to standard error.

Names and texts from files are shown only after `clean`: a terminal obeys escape sequences, and right-to-left marks can
make one name look like another.
"""

from __future__ import annotations

import json as _json
import sys
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from rich.console import Console

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Say nothing but results and errors from now on."""
    global _quiet  # noqa: PLW0603 - one terminal, one voice
    _quiet = quiet


def clean(text: object) -> str:
    r"""Make control, escape and bidirectional characters visible as ``\xNN`` or ``\uNNNN``; all else stays."""
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def out(text: object) -> None:
    """Print one line of a result."""
    click.echo(clean(text))


def json(value: Any) -> None:
    """Print a result for machines. ASCII only, so that nothing in it can steer a terminal."""
    click.echo(_json.dumps(value, indent=2, ensure_ascii=True))


def say(text: object) -> None:
    """Tell something about the work, unless asked to be quiet."""
    if not _quiet:
        click.echo(clean(text), err=True)


def warn(text: object) -> None:
    """Tell something that the user should look at. Never silenced."""
    click.echo(click.style("warning: ", fg="yellow") + clean(text), err=True)


def error(text: object) -> None:
    """Tell, in one line, why there is no result."""
    click.echo(click.style("error: ", fg="red") + clean(text), err=True)


def console(*, stderr: bool = False) -> Console:
    """Return a rich console that neither guesses at numbers nor obeys markup from files."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=not _is_terminal(stderr))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table. Columns named in `right` are set flush right."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(clean(title)) if title else None, title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    console().print(grid)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with bytes, rate and time left on a terminal; nothing in a pipe or when quiet.

    Yields a function that takes the number of bytes done since its last call.
    """
    if _quiet or not _is_terminal(stderr=True):
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(clean(label), total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def counted(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar with a count, a few words and the time left on a terminal; nothing in a pipe or when quiet.

    Yields a function that takes how much was done since its last call, and the words.
    """
    if _quiet or not _is_terminal(stderr=True):
        yield lambda _done, _words: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(clean(label), total=total, words="")
        yield lambda done, words: bar.update(task, advance=done, words=clean(words))


class Screen:
    """The terminal as what long work speaks to; see `sdmerge.train.log.Tell`."""

    def note(self, text: str) -> None:
        """Say something that was decided."""
        say(f"note: {text}")

    def warn(self, text: str) -> None:
        """Say something that the user should look at."""
        warn(text)

    def progress(self, label: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        """Show how far a job is."""
        return counted(label, total)


def human(count: float, unit: str = "B") -> str:
    """Write a count in powers of 1000 with three digits: ``2.13 GB``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or prefix == "T":
            digits = f"{count:.3g}" if prefix and count < 1000 else f"{count:,.0f}"
            return f"{digits} {prefix}{unit}"
        count /= 1000
    raise AssertionError("the loop returns at T")


def _is_terminal(stderr: bool) -> bool:
    return (sys.stderr if stderr else sys.stdout).isatty()

"""``sdmerge train``: one command for each method, its options made from the settings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options, screen

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdmerge.method import Parameter

_SHORT = {"output": "-o"}


class _Option(click.Option):
    """An option with the heading that it stands under."""

    heading = "Options"


class _Command(click.Command):
    """A command whose options stand under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for one in self.get_params(ctx):
            if (record := one.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(one, "heading", "Options"), []).append(record)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


class _Methods(click.Group):
    """The methods; each is loaded when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from sdmerge.train.method import METHODS

        return list(METHODS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from sdmerge.train.method import METHODS

        return _command(cmd_name) if cmd_name in METHODS else None


@click.group("train", cls=_Methods)
def train() -> None:
    """Train a model, or what goes with one, on pictures of your own."""


def _command(name: str) -> click.Command:
    from sdmerge.train.method import find
    from sdmerge.train.settings import fields_for

    method = find(name)
    made: list[click.Parameter] = [
        click.Option(["--config"], type=click.Path(), help="A YAML file with the options' names and values.")
    ]
    for cls, field in fields_for(method):
        option = _option(field)
        option.heading = method.name if cls is method else (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
        made.append(option)
    made.append(click.Option(["--quiet"], is_flag=True, help="Say nothing but results, warnings and errors."))
    made.append(click.Option(["--json", "as_json"], is_flag=True, help="Report as JSON on standard output."))

    def run(**given: Any) -> None:
        _run(name, given)

    return _Command(name, params=made, callback=run, help=f"{method.title}\n\n{inspect.getdoc(method)}")


def _option(field: Parameter) -> _Option:
    """Return the option of a setting. Its value is None where it is not given, so that --config can give it."""
    flag = f"--{field.name.replace('_', '-')}"
    names = [field.name, *([_SHORT[field.name]] if field.name in _SHORT else []), flag]
    low, high = field.param.low, field.param.high
    kinds: dict[type, Callable[[], click.ParamType[Any]]] = {
        int: lambda: click.IntRange(None if low is None else int(low), None if high is None else int(high)),
        float: lambda: click.FloatRange(low, high),
        str: lambda: click.Choice(field.param.choices) if field.param.choices else click.STRING,
        list: lambda: click.STRING,
    }
    shown = (
        "" if field.required or field.default in (None, ()) or field.kind is bool else f"  [default: {field.default}]"
    )
    text = f"{field.param.help[:1].upper()}{field.param.help[1:]}.{shown}"
    if field.kind is bool:
        text += f"  [default: {'yes' if field.default else 'no'}]"
        return _Option([field.name, f"{flag}/--no-{field.name.replace('_', '-')}"], default=None, help=text)
    return _Option(names, type=kinds[field.kind](), multiple=field.kind is list, default=None, help=text)


def _run(name: str, given: dict[str, Any]) -> None:
    from sdmerge import train as trains
    from sdmerge.errors import RequestError
    from sdmerge.train.data import DataProblems

    quiet, as_json, config = given.pop("quiet"), given.pop("as_json"), given.pop("config")
    screen.set_quiet(quiet)
    values = _configured(config) | {key: value for key, value in given.items() if value not in (None, ())}
    try:
        reports = trains.run(name, tell=screen.Screen(), **values)
    except DataProblems as found:
        for problem in found.problems:
            screen.warn(problem)
        count = len(found.problems)
        raise RequestError(
            f"the data has {count:,} problem{'s' * (count > 1)}, told above; nothing was trained"
        ) from found
    options.show(reports, as_json=as_json)


def _configured(path: str | None) -> dict[str, Any]:
    """Return what a YAML file says.

    Raises:
        RequestError: it holds no names and values.
    """
    if path is None:
        return {}
    from pathlib import Path

    from sdmerge.errors import RequestError
    from sdmerge.recipe_file import read_yaml

    data = read_yaml(Path(path))
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RequestError(f"{path}: holds no settings (expected names and values, one on each line)")
    return {key.replace("-", "_"): value for key, value in data.items()}

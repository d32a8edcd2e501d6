"""``sdmerge methods``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import screen

if TYPE_CHECKING:
    from sdmerge.method import Method


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, one for each method.")
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods, or explain one."""
    from sdmerge import methods as registered  # noqa: F401 - registers them
    from sdmerge.method import METHODS, find

    chosen = [find(name)] if name else [METHODS[key] for key in sorted(METHODS)]
    if as_json:
        screen.json([_described(one) for one in chosen])
    elif name:
        _explain(chosen[0])
    else:
        screen.table("", ("method", "models", "what it does"), [(m.name, _models(m), m.summary) for m in chosen])


def _described(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "source": method.source,
        "models": list(method.models),
        "at_least": method.at_least,
        "base": method.base,
        "whole_tensors": not method.elementwise,
        "parameters": [
            {
                "name": p.name,
                "help": p.param.help,
                "type": "numbers" if p.kind is tuple else p.kind.__name__,
                "default": None if p.required else p.default,
                "required": p.required,
                "low": p.param.low,
                "high": p.param.high,
                "choices": list(p.param.choices),
                "block_weights": p.param.weight,
            }
            for p in method.parameters
        ],
    }


def _models(method: Method) -> str:
    count = " ".join(name.upper() for name in method.models) or f"{method.at_least} or more"
    return count + {"no": "", "optional": " [--base]", "required": " --base"}[method.base]


def _explain(method: Method) -> None:
    prose = (inspect.getdoc(method.function) or "").partition("\n\n")[2]
    prose = prose.partition("Formula:")[0].partition("Args:")[0].strip()
    rows = [("formula", method.formula), ("models", _models(method)), ("source", method.source)]
    if prose:
        rows.append(("more", " ".join(prose.split())))
    screen.table(f"{method.name}: {method.summary}", ("field", "value"), rows)
    parameters = [
        (
            p.name,
            "needed" if p.required else _shown(p.default),
            p.expects,
            "yes" if p.param.weight else "",
            p.param.help,
        )
        for p in method.parameters
    ]
    if parameters:
        screen.table("", ("parameter", "default", "expected", "block weights", "meaning"), parameters)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(f"{number:g}" for number in default)
    return f"{default:g}" if isinstance(default, float) else str(default).lower()

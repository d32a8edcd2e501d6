"""Every training method on a concept that the tiny base model does not know: losses, time, size, pictures. See README.md."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import concept, train_cases
from benchmarks.report import save
from sdmerge import pictures
from sdmerge.sampling import Painting, paint
from sdmerge.train.loading import load
from sdmerge.train.losses import schedule_of
from sdmerge.train.settings import LossSettings, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from sdmerge.train.networks import Networks

_PROMPTS = (
    "a large {} in the center, cream background",
    "a small {} on the left, navy background",
    "a large {} at the top, mint background",
    "a large red heart in the center, cream background",
)
_WORDS = ("thing", "shape", "square", "cross", "moon", "heart", "circle", "triangle", "ring", "diamond")
_PAINTING = Painting(steps=30, guidance=4.0)


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--case", "chosen", multiple=True, help="Only these; all where not given.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Where to paint what the models of the first seed paint."
)
def main(seeds: int, chosen: tuple[str, ...], json_path: Path | None, picture: Path | None) -> None:
    """Train, ask, print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = _base()
    found: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, list[Image]] = {"base": _painted(load(ModelSettings(**train_cases.BASE)), concept.TOKEN)}
    for name in chosen or train_cases.CASES:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                case = train_cases.CASES[name]
                result = train_cases.measure(case, Path(folder), seed)
            found.setdefault(name, []).append(_figures(result))
            if seed == 0:
                rows[name] = _painted(result.run.networks, case.token)
    _print(base, found)
    save({"settings": dict(train_cases.COMMON), "base": base, "methods": found}, json_path)
    if picture is not None:
        columns = [prompt.format(concept.TOKEN) for prompt in _PROMPTS]
        made = pictures.sheet("", [(name, "") for name in rows], columns, list(rows.values()))
        pictures.save(made, picture, overwrite=True)


def _base() -> dict[str, float]:
    """Return the base's losses, also with the word that does best in the new one's place."""
    networks = load(ModelSettings(**train_cases.BASE))
    schedule = schedule_of(networks.scheduler, LossSettings(), "auto")
    about, known, of_class = train_cases.questions(networks, kind=train_cases.CLASS)
    named = concept.questions(networks, concept.diamonds(train_cases.ASKED, seed=99, token=train_cases.THING))
    words = {word: concept.loss(networks, schedule, about, word) for word in _WORDS}
    return {
        "concept": concept.loss(networks, schedule, about),
        "best word": min(words.values()),
        "concept, named by its class": concept.loss(networks, schedule, named),
        "known": concept.loss(networks, schedule, known),
        "class": concept.loss(networks, schedule, of_class),
    }


def _figures(result: train_cases.Result) -> dict[str, Any]:
    return {
        "concept": result.concept,
        "known": result.known,
        "class": result.kind,
        "seconds": round(result.seconds, 1),
        "trained": result.trained,
        "bytes": result.nbytes,
    }


def _painted(networks: Networks, token: str) -> list[Image]:
    networks.unet.eval()
    return paint(networks, [prompt.format(token) for prompt in _PROMPTS], [7] * len(_PROMPTS), _PAINTING)


def _print(base: Mapping[str, float], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    table = Table(
        title=f"base: concept {base['concept']:.4f}, best word {base['best word']:.4f}, known {base['known']:.4f}"
    )
    for heading in ("method", "concept after", "drop", "known after", "class drift", "seconds", "trained", "bytes"):
        table.add_column(heading)
    for name, runs in found.items():
        after = [run["concept"][1] for run in runs]
        drops = [1 - run["concept"][1] / run["concept"][0] for run in runs]
        known = [run["known"][1] for run in runs]
        drifts = [run["class"][1] - run["class"][0] for run in runs]
        table.add_row(
            name,
            f"{statistics.median(after):.4f} ({min(after):.4f}..{max(after):.4f})",
            f"{statistics.median(drops):.0%} ({min(drops):.0%}..{max(drops):.0%})",
            f"{statistics.median(known):.4f} ({min(known):.4f}..{max(known):.4f})",
            f"{statistics.median(drifts):.4f} ({min(drifts):.4f}..{max(drifts):.4f})",
            f"{statistics.median(run['seconds'] for run in runs):.1f}",
            f"{runs[0]['trained']:,}",
            f"{runs[0]['bytes']:,}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()

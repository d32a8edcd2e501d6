"""Methods that change embeddings, on the tiny models: what they reach, and the time of a step. See README.md."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import concept, embedding_effects
from benchmarks.report import save, turns
from sdmerge.demo import load_pipeline
from sdmerge.train.loading import load
from sdmerge.train.settings import ModelSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

VARIATION = concept.TINY / "tiny-image-variation.safetensors"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "textual-inversion": {"steps": 150},
    "dream-artist": {"steps": 60, "alone": 0.5},
    "aesthetic": {"turns": (0, 5, 20), "rate": 3e-4},
    "null-text": {"steps": 50},
    "clip-inversion": {"steps": 100},
}
_NO_TRAINING = ("aesthetic", "null-text")


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option(
    "--method", "chosen", multiple=True, type=click.Choice([*SETTINGS]), help="Only these; all where not given."
)
@click.option("--rounds", default=60, show_default=True, help="Steps of each kind that are timed; 0: none.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(seeds: int, chosen: tuple[str, ...], rounds: int, json_path: Path | None) -> None:
    """Train, ask, print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        load_pipeline(concept.TINY / "tiny-base.safetensors", concept.TINY / "config").save_pretrained(model)
        found = {method: [_effect(method, model, seed) for seed in range(seeds)] for method in chosen or SETTINGS}
        for method, runs in found.items():
            Console(width=120).print(_table(method, runs))
        steps = _step_times(model, Path(name), rounds) if rounds else {}
    Console().print(steps)
    save({"settings": SETTINGS, "methods": found, "seconds per step": steps}, json_path)


def _effect(method: str, model: Path, seed: int) -> Mapping[str, float]:
    began = time.process_time()
    how = SETTINGS[method]
    if method in _NO_TRAINING:
        networks = load(ModelSettings(model=str(model)))
        encoder = (embedding_effects.image_encoder(model),) if method == "aesthetic" else ()
        found = embedding_effects.EFFECTS[method](networks, *encoder, seed, **how)
    else:
        path = VARIATION if method == "clip-inversion" else model
        with tempfile.TemporaryDirectory() as folder:
            found = embedding_effects.EFFECTS[method](path, Path(folder), seed, **how)
    return {**found, "CPU seconds": round(time.process_time() - began, 1)}


def _table(method: str, runs: list[Mapping[str, float]]) -> Table:
    table = Table(title=method, title_justify="left")
    for heading in ("", "median", "least", "most"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in runs[0]:
        values = [run[name] for run in runs]
        table.add_row(name, *(f"{one:.4g}" for one in (statistics.median(values), min(values), max(values))))
    return table


def _step_times(model: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Return median seconds of a step, ours and of diffusers' example, one after the other in turns."""
    given = {"token": embedding_effects.TOKEN, "template": "captions", "init": embedding_effects.INIT}
    run = embedding_effects.judged("textual-inversion", model, folder, 0, steps=10**6, **given).run

    def ours() -> None:
        run._step()
        run.step += 1

    kinds: dict[str, Callable[[], object]] = {"sdmerge": ours}
    for encoded in (False, True):
        example = _example(model, folder / "data", run.sources[0], encoded=encoded)
        kinds["diffusers' example, latents kept" if encoded else "diffusers' example"] = example.__next__
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number, (name, step) in turns([*kinds.items()], rounds, warm_up=3):
        began = time.perf_counter()
        step()
        seconds[name] += [time.perf_counter() - began] if number > 0 else []
    found = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"ours / {name}": found["sdmerge"] / value for name, value in found.items() if name != "sdmerge"}
    return found | ratios


def _example(model: Path, data: Path, source: Any, *, encoded: bool) -> Iterator[None]:
    """Train as the example of diffusers does: a row of the table, which is restored around it after each step.

    Args:
        encoded: take latents that were encoded before; the example encodes pictures in every step.
    """
    import diffusers

    from sdmerge.train import data as files

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.tokenizer.add_tokens([embedding_effects.TOKEN])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    for module in (pipe.vae, pipe.unet, pipe.text_encoder):
        module.requires_grad_(False)
    table = pipe.text_encoder.get_input_embeddings()
    table.weight.requires_grad_(True)
    kept = table.weight.detach().clone()
    others = torch.arange(len(table.weight)) != len(table.weight) - 1
    optimizer = torch.optim.AdamW(table.parameters(), lr=5e-3)
    drawn = {path: files.pixels(files.opened(path), (64, 64))[0] for path in sorted(data.glob("*.png"))}
    number = 0
    while True:
        batch = source(number)
        number += 1
        latents = batch.latents
        if not encoded:
            pixels = torch.stack([drawn[path] for path in batch.pictures])
            with torch.no_grad():
                latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
        ids = pipe.tokenizer(
            list(batch.captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        noisy = schedule.add_noise(latents, batch.noise, batch.when)
        predicted = pipe.unet(noisy, batch.when, pipe.text_encoder(ids)[0]).sample
        torch.nn.functional.mse_loss(predicted.float(), batch.noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table.weight[others] = kept[others]
        yield


if __name__ == "__main__":
    main()

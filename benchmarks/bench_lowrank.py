"""Extracting at a rank, against the whole decomposition that the usual scripts call, shape by shape. See README.md."""

from __future__ import annotations

import time
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.adapter_files import places, tensors_of
from benchmarks.measure import describe_machine
from benchmarks.report import save, table_of
from benchmarks.shapes import FAMILIES
from sdkernels import subspace

_BEYOND = 32


@click.command()
@click.option("--family", type=click.Choice(list(FAMILIES)), default="sd15", show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option(
    "--rounds", default=3, show_default=True, help="Of ours; the whole decomposition runs once for each shape."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(family: str, rank: int, rounds: int, json_path: Path | None) -> None:
    """Measure, print a table, write JSON. One thread."""
    torch.set_num_threads(1)
    specs = FAMILIES[family].specs()
    layers = places(dict(tensors_of(specs, rank)), specs).values()
    shapes = Counter((specs[name].shape[0], prod(specs[name].shape[1:])) for name in layers)
    rows = [_measured(shape, count, rank, rounds) for shape, count in sorted(shapes.items())]
    ours, usual = (sum(row[name] * row["layers"] for row in rows) for name in ("seconds", "svd seconds"))
    count = sum(row["layers"] for row in rows)
    total = {
        "family": family,
        "rank": rank,
        "seconds": ours,
        "svd seconds": usual,
        "x": usual / ours,
        "mean excess": sum(row["excess"] * row["layers"] for row in rows) / count,
        "largest excess": max(row["excess"] for row in rows),
    }
    console = Console()
    console.print(table_of(rows))
    console.print(total)
    machine = describe_machine() | {"torch": torch.__version__}
    save({"machine": machine, "total": total, "shapes": rows}, json_path)


def _measured(shape: tuple[int, int], count: int, rank: int, rounds: int) -> dict[str, Any]:
    """Measure one shape: a matrix whose singular values fall off like 1 / √i, as those of fine-tunes roughly do."""
    source = torch.Generator().manual_seed(sum(shape))
    side = min(shape)
    decay = torch.arange(1, side + 1).float().rsqrt() / prod(shape) ** 0.5
    a = (torch.randn(shape[0], side, generator=source) * decay) @ torch.randn(side, shape[1], generator=source)
    start = torch.rand(side, min(side, rank + _BEYOND), generator=source) - 0.5
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        small = a.T.contiguous() if shape[0] > shape[1] else a
        found = subspace.leading(small, min(rank, side), start)
        right = found.vectors.T @ small
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    _, sigma, _ = torch.linalg.svd(a)
    usual = time.perf_counter() - began
    best = sigma[rank:].double().square().sum()
    error = a.double().square().sum() - right.double().square().sum()
    return {
        "shape": "x".join(map(str, shape)),
        "layers": count,
        "seconds": sorted(times)[len(times) // 2],
        "svd seconds": usual,
        "x": usual / sorted(times)[len(times) // 2],
        "excess": max(0.0, float((error / best).clamp(min=0).sqrt()) - 1) if float(best) > 0 else 0.0,
        "method": found.method,
    }


if __name__ == "__main__":
    main()

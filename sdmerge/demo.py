"""``sdmerge demo``: merge the tiny models of ``examples/tiny`` and paint what each of them can draw.

Two models were fine-tuned from one base; one learned a new shape, the other a new texture. Adding the difference that
the second made to the first gives a model that knows both, and a picture grid shows it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdformats.errors import WriteError
from sdmerge import pictures
from sdmerge.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

    from sdmerge.api import Report

SHAPE, TEXTURE, BASE = "tiny-shape.safetensors", "tiny-texture.safetensors", "tiny-base.safetensors"
PROMPTS = (
    "a large red star in the center, cream background",
    "a large striped blue circle in the center, cream background",
    "a large striped purple star in the center, cream background",
    "a large striped pink star in the center, navy background",
    "a large green heart in the center, lavender background",
    "a small yellow moon at the top, navy background",
)
"""The new shape; the new texture; both, twice; and two things that the base knew already."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        merged: the merged checkpoint.
        picture: the picture grid, a PNG: one row for each model, one column for each prompt.
        report: what the merge did.
    """

    merged: Path
    picture: Path
    report: Report

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file written."""
        return (self.merged, self.picture)


def run_demo(
    directory: Path,
    *,
    models: Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    alpha: float = 1.0,
    steps: int = 30,
    guidance: float = 4.5,
    seed: int = 0,
) -> DemoResult:
    """Write shape + alpha (texture - base) into `directory`, and a grid of what all four models paint.

    Args:
        directory: where the files go; made where it is missing. Files of an earlier demo are replaced.
        models: the folder of the tiny models; found in the checkout where not given.
        prompts: one column each.
        alpha: how much of the difference is added.
        steps: DDIM steps of a picture.
        guidance: scale of classifier-free guidance.
        seed: the column's number is added to it; each column starts from the same noise in all rows.

    Raises:
        sdmerge.errors.RequestError: the tiny models or the packages that paint are missing.
        sdformats.errors.FormatError: a file cannot be read or written.
    """
    import sdmerge

    folder = find_models() if models is None else models
    _require_painters()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot be made: {error.strerror or error}", path=directory) from error
    merged = directory / "merged.safetensors"
    a, b, c = (folder / name for name in (SHAPE, TEXTURE, BASE))
    report = sdmerge.add_difference(a, b, c, alpha=alpha, output=merged, overwrite=True)
    rows = [
        ("A", "fine-tuned on stars", a),
        ("B", "fine-tuned on stripes", b),
        ("C", "the base of both", c),
        ("A + (B - C)" if alpha == 1 else f"A + {alpha:g} (B - C)", "merged: knows both", merged),
    ]
    painted = [paint(path, folder / "config", prompts, steps, guidance, seed) for _, _, path in rows]
    picture = directory / "demo.png"
    labels = [(name, f"{path.name}\n{what}") for name, what, path in rows]
    title = "Add difference: give A what B learned over C"
    pictures.save(pictures.sheet(title, labels, prompts, painted, marked=True), picture, overwrite=True)
    return DemoResult(merged, picture, report)


def find_models() -> Path:
    """Find ``examples/tiny`` in the checkout that this package, or else the current folder, lies in.

    Raises:
        RequestError: there is none; the message says how to get it.
    """
    for start in (Path(__file__).resolve(), Path.cwd() / "."):
        for folder in _upwards(start):
            tiny = folder / "examples" / "tiny"
            if all((tiny / name).is_file() for name in (SHAPE, TEXTURE, BASE)):
                return tiny
    raise RequestError(
        "the tiny models are not here: an installed package leaves them out (expected examples/tiny/tiny-*.safetensors); "
        "run this inside a checkout of the repository or an unpacked sdist, or make them with examples/train_tiny.py"
    )


def _upwards(start: Path) -> Iterator[Path]:
    yield start
    yield from start.parents


def _require_painters() -> None:
    """Refuse early, and in one line, where the packages of the extra are missing."""
    for name in ("diffusers", "transformers", "PIL"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RequestError(
                f"the demo paints with {name}, which cannot be imported ({error}); pip install 'sdmerge[demo]'"
            ) from error


def load_pipeline(checkpoint: Path, config: Path) -> Any:
    """Load a single-file checkpoint as diffusers does for every SD1 file, from local configurations only.

    Returns a ``StableDiffusionPipeline`` in float32 on the CPU.
    """
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    checkpoint: Path, config: Path, prompts: Sequence[str], steps: int, guidance: float, seed: int
) -> list[Image]:
    """Paint one picture for each prompt with one model."""
    import torch

    pipeline = load_pipeline(checkpoint, config)
    noise = [torch.Generator().manual_seed(seed + column) for column in range(len(prompts))]
    images: list[Image] = pipeline(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=noise
    ).images
    return images

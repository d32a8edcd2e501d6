"""``sdmerge sample``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sdmerge.cli import options, screen

if TYPE_CHECKING:
    from sdmerge.applied import Files

_with_options = options.together(
    click.option("--adapter", "adapters", multiple=True, metavar="FILE[:STRENGTH]", help="An adapter to add to the model."),
    click.option("--embedding", "embeddings", multiple=True, metavar="FILE", help="New words, called as in the file, or as it."),
    click.option("--aesthetic", metavar="FILE[:STEPS]", help="A style that the text encoder is moved toward; 5 steps."),
    click.option("--aesthetic-lr", default=1e-4, show_default=True, help="Learning rate of these steps."),
    click.option("--aesthetic-weight", type=click.FloatRange(0, 1), default=1.0, show_default=True,
                 help="How much of the moved text encoder is taken."),
    click.option("--aesthetic-slerp", is_flag=True, help="Mix along the arc, not the line."),
    click.option("--clip", metavar="PATH", help="The CLIP model that the text encoder comes from, for --aesthetic."),
    click.option("--null-text", metavar="FILE", help="An inverted picture: its noise, embeddings, steps and guidance."),
    click.option("--image-embedding", metavar="FILE", help="An image embedding in the prompt's place."),
    click.option("--recipe", type=click.Path(), help="A recipe in the model's place; it is merged in memory."),
    click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="A value for what the recipe has under set."),
    click.option("--sweep", "sweeps", multiple=True, metavar="NAME=FROM:TO:STEP", help="Values of a name under set."),
    click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="What to paint; several make an axis."),
    click.option("--negative", default="", help="What to keep away from."),
    click.option("--seeds", default="0", show_default=True, metavar="N,N,...|FROM-TO", help="Seeds; several make an axis."),
    click.option("--strengths", metavar="S,S,...", help="Factors of the adapters' strengths; they make an axis."),
    click.option("--grid", default="", metavar="ROWS:COLUMNS", help="Which axes make rows and columns, as seed,strength:prompt."),
    click.option("--steps", type=click.IntRange(1, 1000), default=30, show_default=True, help="Steps of the scheduler."),
    click.option("--guidance", type=float, default=7.0, show_default=True, help="Scale of classifier-free guidance."),
    click.option("--size", metavar="WIDTHxHEIGHT", help="In pixels; the model's where not given."),
    click.option("--scheduler", default="ddim", show_default=True, metavar="ddim|euler|dpm++", help="How steps are taken."),
    click.option("--prediction", default="auto", show_default=True, type=click.Choice(["auto", "epsilon", "v_prediction"]),
                 help="What the network predicts; auto as its configuration says."),
    click.option("--zero-snr", is_flag=True, help="The last step is noise alone."),
    click.option("--clip-skip", type=click.IntRange(1, 12), default=1, show_default=True, help="Layer of the text encoder."),
    options.TOKENIZER,
    options.MODEL_CONFIG,
    click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True),
    click.option("--overwrite", is_flag=True, help="Replace an existing picture."),
    options.DEVICE,
    options.FAMILY,
    options.QUIET,
    click.option("-o", "--output", required=True, type=click.Path(), help="The PNG file to write."),
)  # fmt: skip


@click.command("sample")
@click.argument("model", type=click.Path(), required=False)
@_with_options
def sample(model: str | None, **given: Any) -> None:
    """Paint a sheet of pictures with a model, adapters, or a recipe that is merged in memory."""
    from pathlib import Path

    from sdmerge import contact_sheet
    from sdmerge.cli import weights
    from sdmerge.lora.strength import parse_strength
    from sdmerge.sampling import Painting
    from sdmerge.train.settings import ModelSettings

    screen.set_quiet(given["quiet"])
    width, height = _size(given["size"])
    files = _files(given)
    prompts = tuple(given["prompts"]) or tuple(text for text in (files.prompt,) if text is not None)
    request = contact_sheet.Request(
        model=ModelSettings(
            model=model or "",
            tokenizer=given["tokenizer"],
            model_config=given["model_config"],
            clip_skip=given["clip_skip"],
            family=given["family"],
        ),
        output=Path(given["output"]),
        prompts=prompts,
        files=files,
        seeds=tuple(_seeds(given["seeds"])),
        painting=Painting(
            width=width,
            height=height,
            **{name: given[name] for name in ("steps", "guidance", "negative", "scheduler", "prediction", "zero_snr")},
        ),
        adapters=tuple(parse_strength(text) for text in given["adapters"]),
        recipe=None if given["recipe"] is None else Path(given["recipe"]),
        changes=weights.assignments(given["changes"]),
        over=weights.swept(given["sweeps"]),
        strengths=tuple(_numbers(given["strengths"])) if given["strengths"] else (),
        **{name: given[name] for name in ("grid", "overwrite", "device", "precision")},
    )
    rows, columns = contact_sheet.sample(request, screen.Screen())
    screen.say(f"{given['output']}: {rows} x {columns} pictures")


def _files(given: dict[str, Any]) -> Files:
    from pathlib import Path

    from sdmerge.applied import Files

    style, colon, steps = (given["aesthetic"] or "").rpartition(":")
    if not (colon and steps.isdigit()):
        style, steps = given["aesthetic"] or "", "5"
    return Files(
        embeddings=tuple(Path(text) for text in given["embeddings"]),
        aesthetic=(Path(style), int(steps)) if style else None,
        rate=given["aesthetic_lr"],
        weight=given["aesthetic_weight"],
        slerp=given["aesthetic_slerp"],
        clip=given["clip"],
        null_text=Path(given["null_text"]) if given["null_text"] else None,
        image=Path(given["image_embedding"]) if given["image_embedding"] else None,
    )


def _seeds(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    try:
        if dash:
            return list(range(int(first), int(last) + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers, and no range", param_hint="--seeds") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers", param_hint="--strengths") from None


def _size(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    wide, x, high = text.lower().partition("x")
    if not x or not wide.isdigit() or not high.isdigit():
        raise click.BadParameter(f"{text!r} is no size (expected WIDTHxHEIGHT)", param_hint="--size")
    return int(wide), int(high)

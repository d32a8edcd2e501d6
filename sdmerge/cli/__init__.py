"""The command line. Commands are loaded when called, so that help and version answer at once.

Exit status: 0 done, 1 an error told in one line, 2 wrong usage, 130 and 143 on SIGINT and SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

import sdmerge
from sdmerge.cli import screen

if TYPE_CHECKING:
    from types import FrameType

COMMANDS = {
    "add-diff": ("sdmerge.cli.merge:add_diff", "A + alpha (B - C): give A what B learned over C."),
    "weighted": ("sdmerge.cli.merge:weighted", "Weighted sum of two or more models."),
    "merge": ("sdmerge.cli.merge:merge", "Merge models by any method; `sdmerge methods` lists them."),
    "bake": ("sdmerge.cli.bake:bake", "Add adapters (LoRA and its relatives) to a model's weights."),
    "run": ("sdmerge.cli.merge:run", "Carry out a recipe (YAML, or mergekit's)."),
    "verify": ("sdmerge.cli.verify:verify", "Derive a merge again from its recipe, and compare every byte."),
    "diff": ("sdmerge.cli.diff:diff", "Compare two models, by block and by tensor."),
    "methods": ("sdmerge.cli.methods:methods", "List the merge methods, or explain one."),
    "layouts": ("sdmerge.cli.layouts:layouts", "List the layouts of adapters and embeddings, and what they can hold."),
    "blocks": ("sdmerge.cli.blocks:blocks", "Show which tensors each block of a family holds."),
    "inspect": ("sdmerge.cli.inspect:inspect", "Say what a model file is and holds."),
    "hash": ("sdmerge.cli.hash:hash_command", "Print the hashes by which model files are known."),
    "convert": (
        "sdmerge.cli.convert:convert",
        "Write a model as one file or as a diffusers folder; adapters, embeddings, small files in other layouts.",
    ),
    "split": ("sdmerge.cli.parts:split", "Write each component of a model into a file of its own."),
    "join": (
        "sdmerge.cli.parts:join",
        "Put a model together from components; a later part takes the place of what is there.",
    ),
    "extract-lora": ("sdmerge.cli.extract:extract_lora", "Extract a LoRA of what a model changed over another."),
    "resize-lora": ("sdmerge.cli.lowrank:resize_lora", "Give an adapter smaller ranks, with the least error."),
    "merge-lora": (
        "sdmerge.cli.lowrank:merge_lora",
        "Merge adapters into one: LoRA, LoHa, LoKr and mixes of them.",
    ),
    "train": ("sdmerge.cli.train:train", "Train a model, or what goes with one, on pictures of your own."),
    "embedding": (
        "sdmerge.cli.embedding:embedding",
        "Mix, stack, slice, extract and bundle textual-inversion embeddings.",
    ),
    "sample": (
        "sdmerge.cli.sample:sample",
        "Paint a sheet of pictures with a model, adapters, or a recipe that is merged in memory.",
    ),
    "compress-custom": (
        "sdmerge.cli.custom:compress_custom",
        "Compress a Custom Diffusion delta, with the least error.",
    ),
    "merge-custom": (
        "sdmerge.cli.custom:merge_custom",
        "Merge the concepts of several Custom Diffusion deltas, in closed form.",
    ),
    "demo": ("sdmerge.cli.demo:demo", "Merge three tiny models and paint what they learned."),
}
"""Name → where the command is, and its first line of help (which a test holds equal to the command's own)."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{COMMANDS[cmd_name][0]} is no command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from sdmerge.errors import nearest

            if near := nearest(args[0], COMMANDS):
                raise click.UsageError(error.message.rstrip(".") + near, ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sdmerge.__version__, prog_name="sdmerge")
def root() -> None:
    """Read, convert and merge Stable Diffusion model files: streaming, exact, safe."""


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _guarded(args)
    except (KeyboardInterrupt, click.Abort):
        status = 130
    except _Terminated:
        status = 143
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    if status > 128:  # a thread may still be in the middle of a block or a sync: end without waiting for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _guarded(args: list[str] | None) -> int:
    """Run the command; return its exit status. Every expected error is one line."""
    from sdformats.errors import FormatError
    from sdmerge.errors import SdmergeError

    try:
        result: Any = root.main(args, prog_name="sdmerge", standalone_mode=False)
    except click.Abort:
        raise
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (FormatError, SdmergeError) as error:
        screen.error(error)
        return 1
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        screen.error(f"{type(error).__name__}: {error}")
        return 1
    except Exception as error:
        if os.environ.get("SDMERGE_DEBUG"):
            raise
        screen.error(f"{type(error).__name__}: {error}; this is a bug in sdmerge, SDMERGE_DEBUG=1 shows where")
        return 1
    return result if isinstance(result, int) else 0

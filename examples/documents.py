"""Run the commands of a document, and show what they paint: ``python examples/documents.py training -o sheet.png``.

Every command under the heading of the examples is run as it stands there, in an empty folder, and its seconds are told.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdmerge import pictures

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {"training-embeddings": "", "training": "## Each method, on the tiny model"}
"""Documents in docs/, and the heading that the examples stand under, where there is other text, too."""
_TITLE = 44
_DRAWN = re.compile(r"examples/draw\.py (\S+)")
_PAINTED = re.compile(r"-o (\S+\.png)")


def sections(document: str) -> dict[str, list[str]]:
    """Return the commands under each heading; continued lines are one command."""
    found: dict[str, list[str]] = {}
    heading = ""
    text = (ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8").replace("\\\n", "")
    if begin := EXAMPLES[document]:
        text = text.partition(begin)[2].partition("\n## ")[0]
    for line in text.splitlines():
        if line.startswith(("## ", "### ")):
            heading = line.lstrip("# ")
        if line.startswith("    "):
            found.setdefault(heading or "Pictures to train on", []).append(" ".join(line.split()))
    return found


def run(command: str, folder: Path, variables: list[str]) -> None:
    """Run a command in a shell, in which `sdmerge` and `python` are those that run this script."""
    shell = [*variables, 'python() { "$PYTHON" "$@"; }', 'sdmerge() { python -m sdmerge "$@"; }']
    began = time.perf_counter()
    subprocess.run(
        ["bash", "-ec", "\n".join([*shell, command])],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable},
        check=True,
    )
    print(f"{time.perf_counter() - began:5.0f} s  {command}", flush=True)


def shown(command: str, folder: Path) -> Image.Image | None:
    """Return the pictures that a command made, if it made any."""
    if drawn := _DRAWN.search(command):
        files = sorted((folder / drawn[1]).glob("*.png"))[:4]
        texts = [file.with_suffix(".txt").read_text(encoding="utf-8") for file in files]
        return pictures.sheet("", [("", "")], texts, [[Image.open(file).convert("RGB") for file in files]])
    painted = _PAINTED.search(command)
    return None if painted is None else Image.open(folder / painted[1]).convert("RGB")


def stacked(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Put sheets side by side under their headings."""
    wide = max(sum(sheet.width for sheet in sheets) for sheets in rows.values())
    made = Image.new(
        "RGB", (wide, sum(_TITLE + max(one.height for one in sheets) for sheets in rows.values())), "white"
    )
    y = 0
    for heading, sheets in rows.items():
        ImageDraw.Draw(made).text((10, y + 14), heading, "black", ImageFont.load_default(24))
        x, y = 0, y + _TITLE
        for sheet in sheets:
            made.paste(sheet, (x, y))
            x += sheet.width
        y += max(one.height for one in sheets)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", choices=EXAMPLES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    found = sections(chosen.document)
    variables = [line for lines in found.values() for line in lines if re.match(r"[A-Z]+=", line)]
    rows: dict[str, list[Image.Image]] = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "examples").symlink_to(ROOT / "examples")
        for heading, lines in found.items():
            for line in lines:
                if line in variables:
                    continue
                run(line, Path(name), variables)
                if (sheet := shown(line, Path(name))) is not None:
                    rows.setdefault(heading, []).append(sheet)
    pictures.save(stacked(rows), chosen.output, overwrite=True)


if __name__ == "__main__":
    main()

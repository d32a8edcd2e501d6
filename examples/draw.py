"""Draw pictures to train on: ``python examples/draw.py pictures --word "<ring>"``.

Each shows one thing at some place in some size, with a caption beside it that calls the thing by the word.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import shapes
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--thing", default="red ring", help="a colour and a shape")
    parser.add_argument("--word", help="what captions call it; the thing itself where not given")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    colour, shape = chosen.thing.split()
    rng = np.random.default_rng(chosen.seed)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for number in range(chosen.count):
        scene = shapes.with_words(shapes.sample(rng), colour=colour, shape=shape)
        path = chosen.folder / f"{number:03d}.png"
        Image.fromarray(shapes.render(scene)).save(path)
        caption = scene.caption().replace(chosen.thing, chosen.word or chosen.thing)
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main()

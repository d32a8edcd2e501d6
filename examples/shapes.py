"""Captioned 64x64 pictures of shapes: what the tiny models are trained on.

A picture is a `Scene`: shape x colour x size x place x background, and perhaps a texture. It is drawn from signed
distances (pixels, negative inside), so edges are smooth at any size, over a soft background with a soft shadow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Plane = NDArray[np.float32]

SIZE = 64
BASE_SHAPES = ("circle", "square", "triangle", "ring", "cross", "heart", "moon")
NEW_SHAPE = "star"
NEW_TEXTURE = "striped"
COLOURS = {
    "red": (0.86, 0.16, 0.18),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.98, 0.82, 0.14),
    "green": (0.18, 0.64, 0.28),
    "cyan": (0.12, 0.72, 0.80),
    "blue": (0.16, 0.34, 0.84),
    "purple": (0.50, 0.22, 0.70),
    "pink": (0.95, 0.42, 0.66),
}
BACKGROUNDS = {
    "cream": (0.97, 0.94, 0.84),
    "grey": (0.74, 0.75, 0.78),
    "mint": (0.78, 0.93, 0.84),
    "lavender": (0.86, 0.82, 0.95),
    "navy": (0.12, 0.15, 0.28),
    "sky": (0.72, 0.86, 0.97),
}
SIZES = {"small": (10.0, 13.0), "large": (19.0, 23.0)}
PLACES = {
    "in the center": (0.0, 0.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
}
OTHER_WORDS = (
    "photo picture painting drawing of the an and with very far away zoomed out close up plain dotted checkered"
    " diamond hexagon square shape thing object style black white brown light dark bright sks new my"
)
"""Words that no caption holds, kept in the vocabulary for prompts and for later training."""


@dataclass(frozen=True)
class Scene:
    """One picture, completely: its words, and the numbers (pixels) that the words leave open."""

    shape: str
    colour: str
    size: str
    place: str
    background: str
    texture: str = ""
    radius: float = 20.0
    centre: tuple[float, float] = (32.0, 32.0)
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """Say what is in the picture; with `rng`, size, place and background are each left out now and then."""
        keep = [True] * 3 if rng is None else list(rng.random(3) > 0.1)
        head = "a" if rng is None or rng.random() > 0.2 else "a picture of a"
        words = [head, self.size if keep[0] else "", self.texture, self.colour, self.shape]
        words += [self.place if keep[1] else ""]
        text = " ".join(word for word in words if word)
        return f"{text}, {self.background} background" if keep[2] else text


def sample(rng: np.random.Generator, shapes: Sequence[str] = BASE_SHAPES, textures: Sequence[str] = ("",)) -> Scene:
    """Draw a scene at random, all words equally likely."""
    size = str(rng.choice(list(SIZES)))
    place = str(rng.choice(list(PLACES)))
    reach = 15.0 if size == "small" else 8.5
    across, down = PLACES[place]
    jitter = rng.uniform(-1.5, 1.5, 2)
    return Scene(
        shape=str(rng.choice(list(shapes))),
        colour=str(rng.choice(list(COLOURS))),
        size=size,
        place=place,
        background=str(rng.choice(list(BACKGROUNDS))),
        texture=str(rng.choice(list(textures))),
        radius=float(rng.uniform(*SIZES[size])),
        centre=(32.0 + across * reach + float(jitter[0]), 32.0 + down * reach + float(jitter[1])),
        tint=tuple(map(float, rng.uniform(-0.03, 0.03, 3))),  # type: ignore[arg-type] # three in, three out
    )


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene. Returns RGB bytes [64, 64, 3]."""
    down, across = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    x, y = across - scene.centre[0], down - scene.centre[1]
    fade = (down / SIZE - 0.5)[..., None]
    picture = np.float32(BACKGROUNDS[scene.background]) + np.float32(scene.tint) - 0.06 * fade

    distance = _DISTANCES[scene.shape]
    shadow = 1.0 / (1.0 + np.exp(np.clip(distance(x - 1.5, y - 2.5, scene.radius) / 1.6, -30, 30)))
    picture = picture * (1.0 - 0.22 * shadow[..., None])

    paint = (
        np.float32(COLOURS[scene.colour])
        + np.float32(scene.tint)
        - 0.16 * np.clip(y / scene.radius, -1, 1)[..., None] * 0.5
    )
    if scene.texture == NEW_TEXTURE:
        band = np.clip(0.15 + 2.2 * np.sin((across + down) * (2 * np.pi / 16)), 0, 1)[..., None]
        paint = paint + (np.float32((0.99, 0.98, 0.96)) - paint) * (0.9 * band)
    cover = np.clip(0.5 - distance(x, y, scene.radius), 0, 1)[..., None]
    picture = picture + (paint - picture) * cover
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Draw many scenes. Returns RGB bytes [n, 64, 64, 3]."""
    return np.stack([render(scene) for scene in scenes])


def with_words(scene: Scene, **words: str) -> Scene:
    """Return the same scene with some words exchanged (for held-out pairs that differ in one thing only)."""
    return replace(scene, **words)  # type: ignore[arg-type] # the word fields are all text


def _circle(x: Plane, y: Plane, r: float) -> Plane:
    return np.hypot(x, y) - 0.92 * r


def _ring(x: Plane, y: Plane, r: float) -> Plane:
    return np.abs(np.hypot(x, y) - 0.72 * r) - 0.25 * r


def _box(x: Plane, y: Plane, across: float, down: float) -> Plane:
    dx, dy = np.abs(x) - across, np.abs(y) - down
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x: Plane, y: Plane, r: float) -> Plane:
    return _box(x, y, 0.8 * r, 0.8 * r)


def _cross(x: Plane, y: Plane, r: float) -> Plane:
    return np.minimum(_box(x, y, 0.95 * r, 0.3 * r), _box(x, y, 0.3 * r, 0.95 * r))


def _moon(x: Plane, y: Plane, r: float) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.95 * r, 0.78 * r - np.hypot(x - 0.5 * r, y + 0.1 * r))


def _polygon(x: Plane, y: Plane, corners: NDArray[np.float64]) -> Plane:
    """Signed distance to a polygon: the nearest edge, negative where an even-odd ray count says inside."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -nearest, nearest)


def _triangle(x: Plane, y: Plane, r: float) -> Plane:
    return _polygon(x, y, np.array([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]) * r)


def _star(x: Plane, y: Plane, r: float) -> Plane:
    angle = np.arange(10) * (np.pi / 5) - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 1.1, 0.46) * r
    return _polygon(x, y, np.stack([reach * np.cos(angle), reach * np.sin(angle) + 0.05 * r], axis=1))


def _heart(x: Plane, y: Plane, r: float) -> Plane:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    across = 16 * np.sin(angle) ** 3
    up = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return _polygon(x, y, np.stack([across, -up - 2.5], axis=1) * (r / 16.5))


_DISTANCES: dict[str, Callable[[Plane, Plane, float], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
    NEW_SHAPE: _star,
}

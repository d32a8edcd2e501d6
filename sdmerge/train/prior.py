"""Prior preservation: pictures of the class beside those of the concept, so that the class stays what it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import LoopMethod, Part

if TYPE_CHECKING:
    from sdmerge.train.log import Tell
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings

INSTANCE, CLASS = "instance", "class"
"""Subfolders of a data folder that has both."""


@dataclass(frozen=True, kw_only=True)
class WithPrior(LoopMethod):
    """A method that may be shown pictures of the class, too."""

    class_data: Annotated[str | None, Param("a folder with pictures of the class; painted where there are too few")] = (
        None
    )
    class_prompt: Annotated[str | None, Param("the caption of those pictures, as 'a dog'")] = None
    class_images: Annotated[int, Param("how many there must be", 1)] = 100
    prior_weight: Annotated[float, Param("what their loss is multiplied with", 0)] = 1.0

    def parts(self, settings: Settings, networks: Networks, tell: Tell) -> tuple[Part, ...]:
        folder = Path(settings.data.data)
        prior = None if self.class_data is None else Path(self.class_data)
        if (folder / INSTANCE).is_dir():
            prior = folder / CLASS if prior is None and (folder / CLASS).is_dir() else prior
            folder = folder / INSTANCE
        parts = [Part(folder, settings.data.caption)]
        if prior is not None:
            self._fill(prior, settings, networks, tell)
            parts.append(Part(prior, self.class_prompt, self.prior_weight))
        elif self.class_prompt is not None:
            raise RequestError(
                "class_prompt says what the class is (expected class_data too: the folder for its pictures)"
            )
        return tuple(parts)

    def _fill(self, folder: Path, settings: Settings, networks: Networks, tell: Tell) -> None:
        """Paint pictures of the class until there are as many as there must be; without a prompt, take what there is."""
        from sdmerge import pictures
        from sdmerge.sampling import Painting, paint
        from sdmerge.train.data import PICTURES
        from sdmerge.train.settings import painting_of

        if self.class_prompt is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.suffix.lower() in PICTURES for path in folder.iterdir())
        missing = range(there, self.class_images)
        if not missing:
            return
        painting = Painting(**painting_of(settings))
        with tell.progress("painting the class", len(missing)) as advance:
            for number in missing:
                [image] = paint(networks, [self.class_prompt], [settings.run.seed + number], painting)
                pictures.save(image, folder / f"class-{number:05d}.png", overwrite=True)
                advance(1, "")
        tell.note(f"painted {len(missing):,} pictures of {self.class_prompt!r} into {folder}")

"""Aesthetic gradients: pictures' mean CLIP features, and a text encoder moved toward them for a prompt (Gallego 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sdmerge.errors import RequestError
from sdmerge.method import Param
from sdmerge.train.method import TrainingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from sdformats.adapters.record import Record
    from sdmerge.execute import Report
    from sdmerge.train.log import Tell
    from sdmerge.train.loop import Saving
    from sdmerge.train.networks import Networks
    from sdmerge.train.settings import Settings
    from sdmerge.train.style import Style

EXPORTS = ("embedding", "checkpoint", "diff", "lora")


@dataclass(frozen=True, kw_only=True)
class Aesthetic(TrainingMethod):
    """The mean image embedding of a folder of pictures; with --export, a text encoder moved toward one by a prompt."""

    name: ClassVar[str] = "aesthetic"
    title: ClassVar[str] = "Aesthetic gradients: an embedding of a style."
    defaults: ClassVar[dict[str, Any]] = {"data": ""}
    takes: ClassVar[tuple[str, ...]] = (
        "model", "tokenizer", "model_config", "family", "data", "output", "dtype", "overwrite",
    )  # fmt: skip

    clip: Annotated[
        str | None, Param("the CLIP model that the text encoder comes from; else the model's own image encoder")
    ] = None
    export: Annotated[str, Param("what to write; all but the embedding are made for a prompt", choices=EXPORTS)] = (
        "embedding"
    )
    style: Annotated[str | None, Param("an embedding that was made before, in place of --data")] = None
    prompt: Annotated[str | None, Param("the prompt to move the text encoder by")] = None
    steps: Annotated[int, Param("steps on the text encoder", 1, 1000)] = 5
    lr: Annotated[float, Param("their learning rate", 0)] = 1e-4
    rank: Annotated[int, Param("of the LoRA", 1, 4096)] = 16
    to: Annotated[str | None, Param("the layout of a LoRA or diff; `sdmerge layouts` lists them")] = None

    def run(self, settings: Settings, tell: Tell) -> list[Report]:
        from dataclasses import replace

        from sdformats.aesthetic import Aesthetic as Record
        from sdformats.aesthetic import write_bare, write_named
        from sdformats.torch_sink import SUFFIXES
        from sdmerge.train.loading import load
        from sdmerge.train.saving import dtype_of, held, plainly, save_small, texts_of
        from sdmerge.train.style import Style

        saving = plainly(settings)
        if self.export != "embedding" and self.prompt is None:
            raise RequestError(f"--export {self.export} is made for a prompt: give one with --prompt")
        embedding, count, projection = self._embedding(settings, tell)
        saving = replace(saving, pictures=count)
        texts = texts_of(self, settings, saving)
        if self.export == "embedding":
            torch_file = saving.target.suffix.lower() in SUFFIXES
            record = Record(held(embedding[None], dtype_of(settings)), texts)
            return [save_small((write_bare if torch_file else write_named)(record), None, saving)]
        networks = load(settings.model)
        style = Style(embedding=embedding, projection=projection, steps=self.steps, rate=self.lr)
        return [self._exported(networks, style, settings, texts, saving)]

    def _embedding(self, settings: Settings, tell: Tell) -> tuple[Tensor, int, Tensor | None]:
        """Return the embedding, of how many pictures it was made now, and the text's projection."""
        from pathlib import Path

        from sdmerge.train import data
        from sdmerge.train.clip import load_image_encoder
        from sdmerge.train.style import read_style

        encoder = load_image_encoder(self.clip, settings.model)
        if self.style is not None:
            return read_style(Path(self.style)), 0, encoder.text_projection
        if not settings.data.data:
            raise RequestError("give a folder of pictures with --data, or an embedding with --style")
        items = data.find(Path(settings.data.data), captions=False)
        found = []
        with tell.progress("looking", len(items)) as advance:
            for item in items:
                found.append(encoder.features_of([item.path])[0])
                advance(1, "")
        return sum(found[1:], found[0]) / len(found), len(found), encoder.text_projection

    def _exported(
        self, networks: Networks, style: Style, settings: Settings, texts: dict[str, str], saving: Saving
    ) -> Report:
        """Write the moved text encoder."""
        from sdmerge.train.saving import save_adapter, save_model
        from sdmerge.train.style import encoder_for, moved

        place = encoder_for(networks, style)
        name, text = f"te{place + 1}", networks.texts[place]
        after = moved(text, self.prompt or "", style)
        changed = {f"{name}.{key}": one for key, one in after.model.named_parameters()}
        if self.export == "checkpoint":
            return save_model(changed, settings, texts, saving)
        if self.export == "diff":
            records = _changes(text.model, after.model, name, settings)
            return save_adapter(records, networks.family, self.to or "lycoris", texts, saving)
        return self._lora(changed, settings, texts, saving)

    def _lora(self, changed: dict[str, Tensor], settings: Settings, texts: dict[str, str], saving: Saving) -> Report:
        import tempfile
        from dataclasses import replace
        from pathlib import Path

        from sdmerge.lora.budget import Limit
        from sdmerge.lora.extract import extract
        from sdmerge.lora.extraction import Extraction
        from sdmerge.options import Options
        from sdmerge.train.saving import save_model

        base = Path(settings.model.model)
        wide = replace(settings, output=replace(settings.output, dtype="fp32"))
        with tempfile.TemporaryDirectory(dir=saving.target.parent) as folder:
            tuned = Path(folder) / ("tuned" if base.is_dir() else "tuned.safetensors")
            save_model(changed, wide, texts, replace(saving, target=tuned))
            wanted = Extraction(tuned=tuned, base=base, outputs=((saving.target, Limit(rank=self.rank)),), to=self.to)
            options = Options(overwrite=True, family=settings.model.family, dtype=settings.output.dtype)
            return extract(wanted, options)[0]


def _changes(before: Any, after: Any, name: str, settings: Settings) -> dict[str, Record]:
    """Return what changed in a text encoder's layers and norms, whole. Tables of words have no place in an adapter."""
    from torch.nn import LayerNorm, Linear

    from sdformats.adapters.records import Full, Norm
    from sdformats.tensor import Spec
    from sdmerge.lora.held import Held
    from sdmerge.train.saving import dtype_of

    old = dict(before.named_modules())
    found: dict[str, Record] = {}
    for path, module in after.named_modules():
        if not isinstance(module, Linear | LayerNorm):
            continue
        full = path if path.startswith("text_model.") or path == "text_projection" else f"text_model.{path}"
        parts = {
            key: Held(value.detach() - getattr(old[path], key), Spec(tuple(value.shape), dtype_of(settings)))
            for key, value in module.named_parameters()
        }
        made = Full if isinstance(module, Linear) else Norm
        found[f"{name}.{full}"] = made(weight=parts["weight"], bias=parts.get("bias"))
    return found


METHOD = Aesthetic

"""XLabs for Flux: attention processors, ``double_blocks.0.processor.qkv_lora1.down.weight`` (1 the image's, 2 the text's)."""

from functools import cache

from sdformats.adapters import names
from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named, write_named
from sdformats.adapters.roles import DOWN, UP
from sdformats.rule import Rule, one


@cache
def table() -> dict[str, Rule]:
    """Return Flux's modules by XLabs' names for them."""
    found: dict[str, Rule] = {}
    flux = names.flux()
    for module, fusion in flux.items():
        block, number, rest = (*module.split(".", 2), "", "")[:3]
        start = f"{block}.{number}.processor."
        match rest:
            case "img_attn.qkv":
                found[f"{start}qkv_lora1"] = fusion
            case "txt_attn.qkv":
                found[f"{start}qkv_lora2"] = fusion
            case "img_attn.proj":
                found[f"{start}proj_lora1"] = fusion
            case "txt_attn.proj":
                found[f"{start}proj_lora2"] = fusion
            case "linear1":
                found[f"{start}qkv_lora"] = Rule(fusion.parts[:3], (1, 1, 1))
            case "linear2":
                found[f"{start}proj_lora"] = one(fusion.parts[0])
    return found


class _Prefix(Prefix):
    def find(self, middle: str) -> Rule | None:
        return table().get(middle)

    def spell(self, path: str, family: str | None) -> str | None:
        return next((module for module, fusion in table().items() if path in fusion.parts), None)


LAYOUT = AdapterLayout(
    name="xlabs",
    title="XLabs' attention processors for Flux",
    written_by="XLabs-AI's x-flux",
    read_by="x-flux, ComfyUI (x-flux-comfyui), diffusers",
    holds=frozenset({"lora"}),
    alpha="none",
    naming=Naming((_Prefix("", "unet", "flux", flat=False),), {"down.weight": DOWN, "up.weight": UP}),
    marks=(r"^(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight$",),
    families=("flux",),
    read=read_named,
    write=write_named,
)

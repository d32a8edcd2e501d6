"""Names of attention processors, where the projection is part of the tensor's name: ``attn1.processor.to_q_lora.down.weight``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdformats.adapters.naming import Name, Naming
from sdformats.adapters.roles import DOWN, UP
from sdformats.rule import one

_PROCESSOR = re.compile(r"(.*\.attn\d)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_SELF_ATTENTION = re.compile(r"(.*\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_ROLES = {"down": DOWN, "up": UP}
_ATTENTION = re.compile(r"(.*\.attn\d)\.to_(q|k|v|out)(\.0)?")


@dataclass(frozen=True)
class ProcessorNaming(Naming):
    """Names of which some end with a processor.

    Attributes:
        unet: what the UNet's names begin with.
    """

    unet: str = ""

    def understand(self, name: str) -> Name | None:
        if (match := _PROCESSOR.fullmatch(name)) and name.startswith(self.unet):
            block, which, role = match.groups()
            path = f"{block.removeprefix(self.unet)}.to_{which}{'.0' if which == 'out' else ''}"
            return Name(self.unet + path, _ROLES[role], "unet", one(path))
        if match := _SELF_ATTENTION.fullmatch(name):
            block, which, role = match.groups()
            name = f"{block}.{which}_proj.lora_linear_layer.{role}.weight"
        return super().understand(name)

    def module(self, path: str, family: str | None) -> str | None:
        """See `Naming`: of the UNet, attention alone."""
        component, _, rest = path.partition(".")
        if component == "unet":
            return self.unet + rest if _ATTENTION.fullmatch(rest) else None
        return super().module(path, family)

    def spell(self, module: str, role: str) -> str | None:
        match = _ATTENTION.fullmatch(module)
        if match is None:
            return super().spell(module, role)
        short = next((name for name, known in _ROLES.items() if known == role), None)
        return None if short is None else f"{match[1]}.processor.to_{match[2]}_lora.{short}.weight"

"""PEFT's settings, in ``adapter_config.json`` or in diffusers' metadata: where the scale of each module is.

The scale is lora_alpha / r, or lora_alpha / √r with ``use_rslora``; ``rank_pattern`` and ``alpha_pattern`` say otherwise for
some modules. Patterns are names, or ends of names. PEFT takes them for regular expressions; those of a stranger may take
for ever, so what is more than a name is refused.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.records import LoKr, LoRA
from sdformats.errors import CorruptFile, UnsupportedFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdformats.adapters.record import Record

_NAME = re.compile(r"\^?([\w.\\-]+?)\$?")
_KNOWN = ("LORA", "LOHA", "LOKR", "OFT")


def scaled(record: Record, module: str, config: Mapping[str, Any], where: str) -> Record:
    """Return a record with the scale that the settings give it.

    Args:
        record: as its tensors say.
        module: its name as PEFT knows it.
        config: the settings.
        where: the file they are in, for errors.

    Raises:
        CorruptFile: a setting is no number, or the rank is another than the tensors'.
        UnsupportedFile: the settings are for an algorithm, or have a pattern, that is not read here.
    """
    kind = str(config.get("peft_type", "LORA")).upper().removeprefix("PEFTTYPE.")
    if kind not in _KNOWN:
        raise UnsupportedFile(f"is a PEFT adapter of the type {kind}", path=where, expected=", ".join(_KNOWN))
    if record.rank is None:
        return record
    rank = _number(_pattern(config, "rank_pattern", module, where), config, "r", where)
    lora = kind == "LORA"
    alpha = _number(_pattern(config, "alpha_pattern", module, where), config, "lora_alpha" if lora else "alpha", where)
    whole = isinstance(record, LoKr) and record.whole
    if rank != record.rank and lora:
        raise CorruptFile(
            f"has the rank {record.rank}", path=where, key=module, expected=f"{rank:g}, as its config says"
        )
    if not rank > 0 or not math.isfinite(alpha):
        raise CorruptFile(f"says rank {rank:g} and alpha {alpha:g}", path=where, key=module)
    if record.bias is not None and alpha != rank:
        raise UnsupportedFile("scales a bias", path=where, key=module, expected="scale 1 where biases are trained")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    effective = (
        scale if whole else alpha * (record.rank / rank) if not config.get("use_rslora") else scale * record.rank
    )
    return replace(record, alpha=None if scale == 1 else effective)


def _number(override: Any, config: Mapping[str, Any], key: str, where: str) -> float:
    value = override if override is not None else config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CorruptFile(f"says {key} is {str(value)[:40]!r}", path=where, expected="a number")
    return float(value)


def _pattern(config: Mapping[str, Any], key: str, module: str, where: str) -> Any:
    """Return what a pattern that fits the module says; the first one counts, as in PEFT."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CorruptFile(f"has a {key} that is no object", path=where)
    found = patterns.get(module)
    if found is not None:
        return found
    for pattern, value in patterns.items():
        match = _NAME.fullmatch(pattern)
        if match is None:
            raise UnsupportedFile(
                f"has the {key} {pattern[:60]!r}", path=where, expected="names, or ends of names, of modules"
            )
        name = match[1].replace("\\.", ".")
        if module == name or (module.endswith("." + name) and not pattern.startswith("^")):
            return value
    return None


def settings(modules: Mapping[str, LoRA]) -> dict[str, Any]:
    """Return the settings that say the same as these records: the most frequent rank and alpha, and patterns for the others.

    Args:
        modules: records by their names as PEFT will know them; their weights are LoRA's without a mid.

    Raises:
        CannotHold: some are DoRA and some are not, which PEFT has only one switch for.
    """
    ranks = {name: record.rank for name, record in modules.items()}
    alphas = {name: _whole(record.scale * record.rank) for name, record in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dora = {record.magnitude is not None for record in modules.values()}
    if len(dora) > 1:
        name = next(name for name, record in modules.items() if record.magnitude is None)
        raise CannotHold(
            "is no DoRA, but others are: PEFT knows all or none", key=name, advice="convert with --as full"
        )
    return {
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "lora_alpha": alpha,
        "lora_bias": False,
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(modules),
        "use_dora": dora == {True},
        "use_rslora": False,
    }


def _whole(value: float) -> float:
    """Write 4.0 as 4, as PEFT does."""
    return int(value) if value == int(value) else value

"""Compress a delta: what its keys and values changed, as the best approximation of a rank, by the model's own weights.

A file holds u = U S and v = Vᵀ of the change's singular value decomposition.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from sdformats.custom_diffusion.delta import Product
from sdformats.custom_diffusion.write import WRITERS
from sdmerge.custom.forms import layout_for, open_base, open_delta, weight_in, whole
from sdmerge.errors import RequestError
from sdmerge.execute import no_collection
from sdmerge.lora.factors import Spectrum, WholeSpectrum
from sdmerge.lora.held import Held
from sdmerge.lora.refs import value
from sdmerge.lora.shrink import Piece, shrink
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, size_of, typed, write_out

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sdformats.adapters.layout import Written
    from sdformats.adapters.records import LoRA
    from sdformats.custom_diffusion.delta import CustomDiffusion
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.lora.budget import Limit
    from sdmerge.lora.shrink import Shrunk
    from sdmerge.options import Options

KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What is to be compressed.

    Attributes:
        delta: whole or compressed already.
        base: the model that it is for.
        limit: what bounds the ranks.
        to: ``original`` or ``delta``; None: as it is, but for diffusers' form, which cannot be compressed.
    """

    delta: Path
    base: Path
    limit: Limit
    to: str | None = None


def compress(wanted: Compression, target: Path, options: Options) -> Report:
    """Write a delta in factors.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    if not wanted.limit.given:
        raise RequestError("nothing says how far to compress; give one of rank, size, energy, error")
    with ExitStack() as stack:
        with no_collection():
            source, record, seen = open_delta(stack, wanted.delta, options)
            layout = layout_for(wanted.to, source, seen, target)
            layout = "delta" if layout == "diffusers" and wanted.to is None else layout
            places = open_base(stack, wanted.base, seen.family)
            pieces = {name: _piece(weight, weight_in(places, name), options)
                      for name, weight in record.weights.items() if name.endswith(KEYS_AND_VALUES)}  # fmt: skip
        make = partial(_written, record, layout, options)
        shrunk = shrink(pieces, wanted.limit, options, lambda loras: size_of(make(loras), target), "compressing")
        written = make({name: one.record for name, one in shrunk.items() if one.record is not None})
        notes = Notes()
        notes.add(_said(shrunk))
        notes.take(record.notes)
        plan = plan_of(written, (source, places.source), seen.family, notes)
        return write_out(plan, written, target, options, started, "writing")


def _piece(weight: Ref | Product, base: Ref, options: Options) -> Piece:
    full = whole(weight, base)

    def load() -> Spectrum:
        return WholeSpectrum(value(full).float() - value(base).float())

    stored = weight.up if isinstance(weight, Product) else weight
    rows, columns = full.shape
    dtype = options.output_type or stored.spec.dtype
    before = weight.rank if isinstance(weight, Product) else min(rows, columns)
    return Piece(rows=rows, inner=(columns,), dtype=dtype, load=load, before=before)


def _written(record: CustomDiffusion, layout: str, options: Options, loras: Mapping[str, LoRA]) -> Written:
    """Return the delta with its keys and values in factors; those of which nothing is kept are left out."""
    kept = {name: one for name, one in record.weights.items() if not name.endswith(KEYS_AND_VALUES)}
    products = {name: _product(loras[name]) for name in record.weights if name in loras}
    return typed(WRITERS[layout](replace(record, weights={**products, **kept})), options.output_type)


def _product(lora: LoRA) -> Product:
    """Return U S and Vᵀ of factors with √σ on both sides."""
    if not isinstance(lora.up, Held) or not isinstance(lora.down, Held) or lora.down.values.dim() < 2:
        return Product(lora.up, lora.down)  # only its shape is asked for
    lengths = lora.down.values.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    up, down = lora.up.values * lengths, lora.down.values / lengths[:, None]
    return Product(Held(up, lora.up.spec), Held(down, lora.down.spec))


def _said(shrunk: Mapping[str, Shrunk]) -> str:
    lost = math.fsum(one.lost**2 for one in shrunk.values())
    total = math.fsum(one.norm**2 for one in shrunk.values())
    ranks = [one.rank for one in shrunk.values()]
    error = math.sqrt(lost / total) if total else 0.0
    return f"ranks {min(ranks)} to {max(ranks)}; the relative error of all changes together is {error:.3g}"

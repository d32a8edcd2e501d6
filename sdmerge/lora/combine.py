"""Resize adapters, and merge several into one, in factors: no model is needed, and mostly no whole difference is made."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from sdformats.adapters import open_adapter
from sdformats.adapters.adapter import Adapter
from sdformats.adapters.reading import check_holds
from sdformats.adapters.records import LoRA
from sdformats.files import open_source
from sdmerge.errors import FamilyError, RequestError
from sdmerge.execute import no_collection
from sdmerge.lora import terms as sums
from sdmerge.lora.algebra import record_type
from sdmerge.lora.budget import Limit
from sdmerge.lora.convert import layout_for, mapped
from sdmerge.lora.factors import Spectrum, WholeSpectrum, spectrum_of
from sdmerge.lora.refs import fold
from sdmerge.lora.reports import check_places, write_told
from sdmerge.lora.shrink import Piece, Shrunk, shrink
from sdmerge.lora.terms import Product, Term
from sdmerge.lora.texts import model_texts, network_texts
from sdmerge.method import Place, find
from sdmerge.policy import Notes
from sdmerge.writing import plan_of, size_of, write_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from sdformats.adapters.layout import AdapterLayout, Written
    from sdformats.adapters.record import Record
    from sdformats.tensor import TensorSource
    from sdmerge.execute import Report
    from sdmerge.method import Method
    from sdmerge.options import Options

How = Literal["sum", "svd", "ties", "dare"]
_DENSE = {"ties": "ties", "dare": "dare_linear"}
"""The merge methods that need whole differences."""
_OF_THE_MODEL = (
    *("ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_clip_skip"),
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution"),
    *("modelspec.prediction_type", "modelspec.encoder_layer"),
)
"""What is true of a sum of adapters, too; the rest is about how one was trained."""
_OF_THE_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What becomes of one adapter or several.

    Attributes:
        inputs: files, each with its strength.
        how: ``sum`` stacks factors; ``svd`` is a sum that is approximated; ``ties`` and ``dare`` merge whole differences.
        limit: what bounds the ranks; none is given: a sum is exact.
        parameters: of TIES or DARE.
        to: the layout's name; None: the first input's, or one for its family.
        report: where to write what became of each module, as JSON.
        plot: where to paint ranks and energies over the modules.
        adapter_config: PEFT's settings, where they are not beside the file.
        resizes: whether it is one adapter, which stays what it is.
    """

    inputs: tuple[tuple[Path, float], ...]
    how: How = "sum"
    limit: Limit = field(default_factory=Limit)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    to: str | None = None
    report: Path | None = None
    plot: Path | None = None
    adapter_config: Path | None = None
    resizes: bool = False

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise RequestError(f"method is {self.how!r} (expected one of {', '.join(get_args(How))})")
        if self.resizes and not self.limit.given:
            raise RequestError("nothing says how far to resize; give one of rank, size, energy, error")
        if self.how != "sum" and not self.limit.given:
            raise RequestError(f"{self.how} needs a bound for what it makes; give one of rank, size, energy, error")
        if not self.inputs or all(strength == 0 for _, strength in self.inputs):
            raise RequestError("no adapter has a strength other than 0 (expected one or more)")
        if not all(math.isfinite(strength) for _, strength in self.inputs):
            raise RequestError("strengths are finite numbers")
        if self.parameters:
            dense_method(self.how)


def dense_method(how: str) -> Method:
    """Return the merge method that a way of combining is, for its parameters.

    Raises:
        RequestError: it has none.
    """
    if how not in _DENSE:
        raise RequestError(f"{how} has no parameters")
    return find(_DENSE[how])


def combine(wanted: Combination, target: Path, options: Options) -> Report:
    """Write the adapter that a combination describes.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    check_places((target,), wanted.report, wanted.plot, [path for path, _ in wanted.inputs], options)
    with ExitStack() as stack:
        with no_collection():
            files = {path: stack.enter_context(open_source(path)) for path, _ in wanted.inputs}
            read = [open_adapter(files[path], wanted.adapter_config) for path, _ in wanted.inputs]
        adapters = [adapter for adapter, _ in read]
        family = _family(adapters, wanted, options)
        layout = _layout(read[0][1], family, wanted.to)
        sources = tuple(files.values())
        return _Work(wanted, options, adapters, family, layout, target).done(sources, started)


def _family(adapters: Sequence[Adapter], wanted: Combination, options: Options) -> str | None:
    """Return what all adapters are for."""
    if options.family is not None:
        return options.family
    known = {adapter.family: path for adapter, (path, _) in zip(adapters, wanted.inputs, strict=True) if adapter.family}
    if len(known) > 1:
        shown = ", ".join(f"{path.name} for {family}" for family, path in known.items())
        raise FamilyError(
            f"the adapters are for different families: {shown}; --family settles it where one is mistaken"
        )
    return next(iter(known), None)


def _layout(first: AdapterLayout, family: str | None, name: str | None) -> AdapterLayout:
    if name is None and first.write is not None:
        return first
    return layout_for(family, name)


class _Work:
    """One combination on its way."""

    def __init__(
        self,
        wanted: Combination,
        options: Options,
        adapters: Sequence[Adapter],
        family: str | None,
        layout: AdapterLayout,
        target: Path,
    ) -> None:
        self.wanted, self.options, self.adapters = wanted, options, adapters
        self.family, self.layout, self.target = family, layout, target
        self.exact = not wanted.limit.given and options.output_type is None
        self.values: dict[str, Any] = {}
        if wanted.how in _DENSE:
            self.values = dense_method(wanted.how).check(len(adapters), wanted.parameters)

    def done(self, sources: tuple[TensorSource, ...], started: float) -> Report:
        """Compute and write."""
        label = "resizing" if self.wanted.resizes else "merging"
        plain, pieces = self._sorted()
        shrunk: dict[str, Shrunk] = {}
        if pieces:
            shrunk = shrink(pieces, self.wanted.limit, self.options, partial(self._size, plain), label)
        adapter = self._adapter(plain, {path: one.record for path, one in shrunk.items() if one.record is not None})
        written = self._written(adapter)
        plan = plan_of(written, sources, self.family, self._notes(adapter, shrunk))
        report = write_out(plan, written, self.target, self.options, started, label)
        if not self.options.dry_run:
            write_told(_described(self._order(), adapter, shrunk), self.wanted.report, self.wanted.plot, self.options)
        return report

    def _sorted(self) -> tuple[dict[str, Record], dict[str, Piece]]:
        """Return what each module becomes: at once, or what is to be approximated."""
        terms: dict[str, list[Term]] = {}
        for i, (adapter, (_, strength)) in enumerate(zip(self.adapters, self.wanted.inputs, strict=True)):
            _check_scales(adapter, self.wanted.inputs[i][0])
            for path, record in adapter.modules.items() if strength else ():
                terms.setdefault(path, []).append(Term(record, strength, i))
        plain: dict[str, Record] = {}
        pieces: dict[str, Piece] = {}
        for path, found in terms.items():
            products = sums.products_of(path, found, self.family)
            if products is None:
                plain[path] = sums.differences(path, found, exact=self.exact)
            elif self.wanted.limit.given:
                pieces[path] = self._piece(path, found, products)
            else:
                record = sums.stacked(products, exact=self.exact, alpha=self.layout.alpha != "none")
                plain[path] = replace(record, bias=sums.biases(path, found, exact=self.exact))
        return plain, pieces

    def _piece(self, path: str, terms: Sequence[Term], products: tuple[Product, ...]) -> Piece:
        load = self._factored if self.wanted.how not in _DENSE else self._merged
        return Piece(
            load=partial(load, path, products),
            rows=products[0].lora.height,
            inner=sums.inner_of(products),
            dtype=self.options.output_type or record_type(products[0].lora),
            before=sum(one.lora.rank for one in products),
            bias=sums.biases(path, terms, exact=False),
            reshape=products[0].lora.reshape,
        )

    def _factored(self, path: str, products: tuple[Product, ...]) -> Spectrum:
        return spectrum_of(*sums.factors_of(path, products))

    def _merged(self, path: str, products: tuple[Product, ...]) -> Spectrum:
        """Merge whole differences; an adapter that does not change the module has a difference of zeros."""
        deltas: list[torch.Tensor | None] = [None] * len(self.adapters)
        for one in products:
            up, down = sums.factors_of(path, [one])
            deltas[one.index] = up @ down
        zeros = torch.zeros(products[0].lora.height, products[0].lora.columns)
        method = dense_method(self.wanted.how)
        place = {"place": Place(path)} if method.takes_place else {}
        tensors = [zeros if delta is None else delta for delta in deltas]
        return WholeSpectrum(method.function(*tensors, base=zeros, **place, **self.values))

    def _order(self) -> Iterable[str]:
        """Return every module of the inputs once, in their order."""
        return dict.fromkeys(path for adapter in self.adapters for path in adapter.modules)

    def _adapter(self, plain: Mapping[str, Record], loras: Mapping[str, LoRA]) -> Adapter:
        """Return the result, modules in the order of the inputs."""
        both = {**plain, **loras}
        modules = {path: both[path] for path in self._order() if path in both}
        embeddings: dict[str, Any] = {}
        for adapter, (source, strength) in zip(self.adapters, self.wanted.inputs, strict=True):
            for word, inside in adapter.embeddings.items() if strength else ():
                if word in embeddings:
                    raise RequestError(f"{source.name}: brings an embedding {word!r}, as an adapter before it does")
                embeddings[word] = inside
        made = Adapter(modules, embeddings, self._metadata(modules), self.family)
        return mapped(made, self.options)

    def _written(self, adapter: Adapter) -> Written:
        check_holds(self.layout, adapter)
        assert self.layout.write is not None, "check_holds refuses layouts that are only read"
        return self.layout.write(self.layout, adapter, fold)

    def _size(self, plain: Mapping[str, Record], loras: Mapping[str, LoRA]) -> int:
        """Return the size of the file that would be written."""
        return size_of(self._written(self._adapter(plain, loras)))

    def _metadata(self, modules: Mapping[str, Record]) -> dict[str, str]:
        """Return the first input's texts that are still true, and what was done: no dates, no paths."""
        wanted, old = self.wanted, self.adapters[0].metadata
        kept = dict(old) if wanted.resizes else {key: old[key] for key in _OF_THE_MODEL if key in old}
        kept = model_texts(self.family, self.target.stem) | kept
        kept = {key: text for key, text in kept.items() if key not in _OF_THE_NETWORK}
        kept |= network_texts(self.family, self.layout, modules)
        said: dict[str, Any] = dict(wanted.limit.given)
        if not wanted.resizes:
            parameters = {
                name: value for name, value in self.values.items() if isinstance(value, int | float | str | tuple)
            }
            said |= {"method": wanted.how, "strengths": [strength for _, strength in wanted.inputs], **parameters}
        kept["sdmerge.resize_lora" if wanted.resizes else "sdmerge.merge_lora"] = json.dumps(said, sort_keys=True)
        return kept

    def _notes(self, adapter: Adapter, shrunk: Mapping[str, Shrunk]) -> Notes:
        notes = Notes()
        notes.add(f"written as {self.layout.name}")
        for source in self.adapters:
            notes.take(source.notes)
        if shrunk:
            ranks = sorted(one.rank for one in shrunk.values())
            worst = max(shrunk, key=lambda path: shrunk[path].error)
            notes.add(
                f"ranks {ranks[0]} to {ranks[-1]}; relative error {_error(shrunk):.4g} in all, "
                f"at most {shrunk[worst].error:.4g} ({worst})"
            )
        for path, one in shrunk.items():
            if one.record is None:
                notes.add("left out, as the size has no room for it", path)
        for path, record in adapter.modules.items():
            if not isinstance(record, LoRA) and self.wanted.limit.given:
                summed = f", a sum: {self.wanted.how} merges factors alone" if self.wanted.how in _DENSE else ""
                notes.add(f"a difference, kept whole{summed}", path)
        return notes


def _check_scales(adapter: Adapter, path: Path) -> None:
    if not adapter.scaled:
        raise RequestError(
            f"{path}: has no known scale: it is a PEFT file without its adapter_config.json (expected that beside it)"
        )


def _error(shrunk: Mapping[str, Shrunk]) -> float:
    """Return the relative error of all modules together."""
    norm = math.hypot(*(one.norm for one in shrunk.values()))
    return math.hypot(*(one.lost for one in shrunk.values())) / norm if norm else 0.0


def _described(order: Iterable[str], adapter: Adapter, shrunk: Mapping[str, Shrunk]) -> dict[str, Any]:
    """Return what became of each module, in an order."""
    layers: dict[str, Any] = {}
    for path in order:
        if one := shrunk.get(path):
            # The whole spectrum of a product of factors is known, so what is left out is the least that can be.
            told = {"rank": one.rank, "before": one.before, "norm": one.norm}
            layers[path] = told | {"energy": 1 - one.error**2, "error": one.error, "excess_at_most": 0.0}
        elif record := adapter.modules.get(path):
            exact = {"rank": record.rank, "energy": 1.0, "error": 0.0, "excess_at_most": 0.0}
            layers[path] = exact if isinstance(record, LoRA) else {"algorithm": record.algorithm}
    return {"error": _error(shrunk), "layers": layers}

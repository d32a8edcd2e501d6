"""Extract a LoRA from two models: the best approximation of what one changed over the other, layer by layer.

No more than a layer of each model is in memory for each thread. Ranks are fixed, or chosen over the whole model from the
spectra, which takes one more pass.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.errors import CannotHold
from sdformats.adapters.reading import check_holds, ways_out
from sdformats.adapters.records import Full, LoRA, Norm
from sdformats.files import open_source
from sdformats.tensor import DType, Spec
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.execute import no_collection
from sdmerge.lora.convert import layout_for
from sdmerge.lora.decompose import Core, excess, flattened, singular_values, tucker, tucker_curve
from sdmerge.lora.held import Held
from sdmerge.lora.layers import Layer, bias_of, is_noise, layers_of, unpaired
from sdmerge.lora.places import Places
from sdmerge.lora.refs import fold
from sdmerge.lora.reports import check_places, write_told
from sdmerge.lora.shrink import Form, each, fitting
from sdmerge.lora.texts import model_texts, network_texts
from sdmerge.policy import Notes
from sdmerge.run import pick_device
from sdmerge.writing import check_target, plan_of, size_of, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sdformats.adapters.layout import AdapterLayout, Written
    from sdformats.adapters.record import Record
    from sdmerge.execute import Report
    from sdmerge.lora.budget import Limit
    from sdmerge.lora.decompose import Found
    from sdmerge.lora.extraction import Extraction
    from sdmerge.lora.shrink import SizeOf
    from sdmerge.options import Options


@dataclass(frozen=True)
class _Choice:
    """What a layer becomes in one output."""

    form: Form
    rank: int


@dataclass(frozen=True)
class _Spectrum:
    """What each further component of a layer adds: its singular values, and the like of Tucker's form, where it may have one."""

    flat: torch.Tensor
    curve: torch.Tensor | None


@dataclass
class _Work:
    """An extraction under way."""

    wanted: Extraction
    options: Options
    tuned: Places
    base: Places
    layout: AdapterLayout
    device: torch.device
    notes: Notes = field(default_factory=Notes)
    quiet: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> DType:
        """The type of the factors."""
        return self.options.output_type or DType.F16

    def run(self) -> list[tuple[Adapter, dict[str, Any]]]:
        """Return an adapter for each output, and what is told of it."""
        both = {"text_encoders": self.wanted.text_encoders}
        every = list(layers_of(self.tuned, self.base, **both))
        if not every:
            raise MismatchError(
                f"{self.wanted.tuned}: has no module in common with {self.wanted.base} (expected two models of one family)"
            )
        for path, places in unpaired(self.tuned, self.base, **both):
            self.notes.add(f"in {places.source.path.name} alone, so nothing to compare", path)
        matrices = {layer.path: layer for layer in every if len(layer.shape) > 1 and not layer.is_embedding}
        self._check_targets(matrices)
        spectra = self._spectra(matrices) if any(not limit.rank for _, limit in self.wanted.outputs) else {}
        sides = self._sides(every)
        chosen = [
            self._chosen(limit, matrices, spectra, partial(self._bytes, sides, path))
            for path, limit in self.wanted.outputs
        ]
        self.found = self._factors(matrices, chosen)
        for path, why in sorted(self.quiet.items()):
            said = "unchanged" if why == "unchanged" else "left out: its change is the rounding of the files' types"
            self.notes.add(said, path)
        outputs = zip(chosen, self.wanted.outputs, strict=True)
        return [
            (self._adapter(one, sides, path), self._described(one, matrices, spectra)) for one, (path, _) in outputs
        ]

    def _check_targets(self, layers: Mapping[str, Layer]) -> None:
        """Refuse names that are none for the layout's containers before there is work that would be lost."""
        naming, write, family = self.layout.naming, self.layout.write, self.tuned.family
        plain = (path for path, layer in layers.items() if layer.kernel == 1)
        path = next((path for path in plain if naming is not None and naming.module(path, family)), None)
        if path is not None and write is not None:
            one = Adapter({path: self._form(layers[path]).placeholder(1, 1)}, family=family)
            for target, _ in self.wanted.outputs:
                check_target(target, write(self.layout, one, fold))

    def _each(self, layers: Mapping[str, Layer], label: str, work: Callable[[Layer], None]) -> None:
        # The largest layers first: the last ones to end are small, and no thread waits long for another.
        order = sorted(layers, key=lambda path: (-layers[path].tuned.spec.numel, path))
        costs = {path: layers[path].tuned.spec.nbytes + layers[path].base.spec.nbytes for path in order}
        each(costs, lambda path: work(layers[path]), self.options, label)

    def _changed(self, layer: Layer) -> torch.Tensor | None:
        """Return a layer's change as a matrix; None, noted, where it is none."""
        change, noise = layer.change(self.device)
        why = is_noise(change, noise)
        if why is not None:
            self.quiet[layer.path] = why
            return None
        return change

    def _spectra(self, layers: Mapping[str, Layer]) -> dict[str, _Spectrum]:
        """Return the spectrum of every layer that changed."""
        spectra: dict[str, _Spectrum] = {}

        def work(layer: Layer) -> None:
            change = self._changed(layer)
            if change is not None:
                curve = tucker_curve(change) if self._may_have_core(layer) else None
                spectra[layer.path] = _Spectrum(singular_values(change), curve)

        self._each(layers, "looking", work)
        return {path: spectra[path] for path in layers if path in spectra}

    def _chosen(
        self,
        limit: Limit,
        layers: Mapping[str, Layer],
        spectra: Mapping[str, _Spectrum],
        size_of: SizeOf,
    ) -> dict[str, _Choice]:
        """Return what the layers become within a limit; those that become nothing are not there."""
        if limit.rank is not None:
            return {path: self._of_rank(layer, limit.rank) for path, layer in layers.items()}
        if limit.size is not None:
            forms = {path: self._form(layers[path], core=one.curve is not None) for path, one in spectra.items()}
            values = {path: one.flat if one.curve is None else one.curve for path, one in spectra.items()}
            ranks = fitting(values, forms, limit.size, size_of)
            return {path: _Choice(forms[path], rank) for path, rank in ranks.items() if rank}
        flat = limit.ranks({path: one.flat for path, one in spectra.items()})
        chosen = {path: _Choice(self._form(layers[path]), rank) for path, rank in flat.items()}
        curves = {path: _with_rest(one.curve, one.flat) for path, one in spectra.items() if one.curve is not None}
        for path, rank in limit.ranks(curves).items():
            cored = _Choice(self._form(layers[path], core=True), rank)
            if rank < curves[path].numel() and cored.form.nbytes(rank) < chosen[path].form.nbytes(chosen[path].rank):
                chosen[path] = cored
        return chosen

    def _of_rank(self, layer: Layer, rank: int) -> _Choice:
        wanted = rank if self.wanted.conv_rank is None or layer.kernel == 1 else self.wanted.conv_rank
        flat, cored = self._form(layer), self._form(layer, core=True)
        if self._may_have_core(layer) and wanted < min(layer.shape[:2]) and cored.nbytes(wanted) < flat.nbytes(wanted):
            return _Choice(cored, wanted)
        return _Choice(flat, min(wanted, layer.shape[0], layer.columns))

    def _may_have_core(self, layer: Layer) -> bool:
        """Whether a layer may have Tucker's form: where a side is no wider than the kernel there is little to win."""
        return self.wanted.conv == "tucker" and 1 < layer.kernel < min(layer.shape[:2])

    def _form(self, layer: Layer, *, core: bool = False) -> Form:
        return Form(rows=layer.shape[0], inner=layer.shape[1:], dtype=self.dtype, tucker=core)

    def _factors(self, layers: Mapping[str, Layer], chosen: Sequence[Mapping[str, _Choice]]) -> dict[str, list[Found]]:
        """Return for each layer what its outputs need: one decomposition for all flat ones, one for each rank with a core."""
        found: dict[str, list[Found]] = {}
        wanted = {path: [one[path] for one in chosen if path in one] for path in layers}

        def work(layer: Layer) -> None:
            change = None if layer.path in self.quiet else self._changed(layer)
            if change is None:
                return
            settings = (layer.path, self.wanted.tolerance, self._stored)
            flat = max((one.rank for one in wanted[layer.path] if not one.form.tucker), default=0)
            cored = sorted({one.rank for one in wanted[layer.path] if one.form.tucker})
            found[layer.path] = [tucker(change, rank, *settings) for rank in cored]
            found[layer.path] += [flattened(change, flat, *settings)] if flat else []

        self._each({path: layer for path, layer in layers.items() if wanted[path]}, "extracting", work)
        return {path: found[path] for path in layers if path in found}

    def _stored(self, half: torch.Tensor) -> torch.Tensor:
        """Return a factor as it waits in memory."""
        return _clamped(half, self.wanted.clamp).to("cpu", torch.float16 if self.dtype is DType.F16 else torch.float32)

    def _sides(self, every: Sequence[Layer]) -> dict[str, Record]:
        """Return changes of norms, and of biases alone, where the layout holds them; else they are noted."""
        sides: dict[str, Record] = {}
        for layer in every:
            path = layer.path
            if len(layer.shape) == 1 and not layer.is_embedding and (change := _beyond_noise(layer)) is not None:
                self._side(sides, path, Norm(weight=self._held(change)), "norm")
            if layer.is_embedding and _beyond_noise(layer) is not None:
                self.notes.add("changed, and no part of a LoRA", path)
            both = bias_of(self.tuned, self.base, layer)
            if both is None or (change := _beyond_noise(replace(layer, tuned=both[0], base=both[1]))) is None:
                continue
            if isinstance(norm := sides.get(path), Norm):
                sides[path] = replace(norm, bias=self._held(change))
            else:
                self._side(sides, path, Full(bias=self._held(change)), "full")
        return sides

    def _side(self, sides: dict[str, Record], path: str, record: Record, need: str) -> None:
        if need in self.layout.holds:
            sides[path] = record
        else:
            what = "its norm" if need == "norm" else "its bias"
            self.notes.add(
                f"{what} changed, which {self.layout.name} cannot hold (lycoris and comfy can, with --to)", path
            )

    def _held(self, change: torch.Tensor) -> Held:
        return Held(change, Spec(tuple(change.shape), self.dtype))

    def _of(self, path: str, choice: _Choice) -> Found:
        """Return the decomposition that a choice was made for."""
        fitting = (one for one in self.found[path] if isinstance(one, Core) is choice.form.tucker)
        return next(one for one in fitting if not choice.form.tucker or one.most == choice.rank)

    def _adapter(self, chosen: Mapping[str, _Choice], sides: Mapping[str, Record], target: Path) -> Adapter:
        loras = {
            path: self._of(path, chosen[path]).lora(chosen[path].form, chosen[path].rank)
            for path in self.found
            if path in chosen
        }
        if not loras and not sides:
            raise RequestError(f"{self.wanted.tuned}: nothing changed over {self.wanted.base} but rounding")
        return self._with_texts(_joined(loras, sides), target)

    def _with_texts(self, modules: Mapping[str, Record], target: Path) -> Adapter:
        """Return an adapter with its metadata."""
        family, models = self.tuned.family, {"tuned": self.wanted.tuned.name, "base": self.wanted.base.name}
        texts = model_texts(family, target.stem, self._prediction())
        texts |= network_texts(family, self.layout, modules) | {"sdmerge.extracted": json.dumps(models)}
        return Adapter(dict(modules), metadata=texts, family=family)

    def _prediction(self) -> str | None:
        """Return what the model predicts, where it says that."""
        for places in (self.tuned, self.base):
            if "v_pred" in places.source.specs:
                return "v"
            if said := places.source.metadata.get("modelspec.prediction_type"):
                return said
        return None

    def written(self, adapter: Adapter) -> Written:
        """Return the output's tensors."""
        check_holds(self.layout, adapter)
        assert self.layout.write is not None, "check_holds refuses layouts that are only read"
        return self.layout.write(self.layout, adapter, fold)

    def _bytes(self, sides: Mapping[str, Record], target: Path, loras: Mapping[str, LoRA]) -> int:
        return size_of(self.written(self._with_texts(_joined(loras, sides), target)))

    def _described(
        self, chosen: Mapping[str, _Choice], layers: Mapping[str, Layer], spectra: Mapping[str, _Spectrum]
    ) -> dict[str, Any]:
        """Return what became of each layer of an output, for the report."""
        told: dict[str, dict[str, Any]] = {}
        for path in layers:
            spectrum = spectra.get(path)
            if path in self.found and (choice := chosen.get(path)):
                found = self._of(path, choice)
                error = found.error(choice.rank)
                told[path] = {
                    "rank": choice.rank,
                    "norm": math.sqrt(found.total),
                    "energy": 1 - error**2,
                    "error": error,
                    "excess_at_most": _excess(found, choice.rank, spectrum),
                    "method": found.method,
                }
            elif spectrum is not None:
                norm = float(spectrum.flat.double().norm())
                told[path] = {"rank": 0, "norm": norm, "energy": 0.0, "error": 1.0, "excess_at_most": 0.0}
        left = math.hypot(*(one["norm"] * one["error"] for one in told.values()))
        total = math.hypot(*(one["norm"] for one in told.values()))
        return {
            "error": left / total if total else 0.0,
            "layers": told,
            "left_out": dict(sorted(self.quiet.items())),
        }

    def noted(self, told: Mapping[str, Any]) -> Notes:
        """Return the notes of an output."""
        notes = Notes()
        notes.take(self.notes.lines())
        kept = sum(one["rank"] > 0 for one in told["layers"].values())
        notes.add(f"relative error {told['error']:.4g} over {kept:,} layers, as {self.layout.name}")
        for path, one in told["layers"].items():
            if not one["rank"]:
                notes.add("left out, as the size has no room for it", path)
        return notes


def _excess(found: Found, rank: int, spectrum: _Spectrum | None) -> float:
    """Return how much larger than the smallest possible an error is at most, at the rank of one output of several."""
    if rank == found.most or spectrum is None:
        return found.excess
    squares = spectrum.flat.double().square()
    return excess(found.error(rank) ** 2, float(squares[rank:].sum() / squares.sum()))


def _joined(loras: Mapping[str, LoRA], sides: Mapping[str, Record]) -> dict[str, Record]:
    """Return modules with what else of them changed: a bias goes with the LoRA."""
    biased = {path: replace(lora, bias=sides[path].bias if path in sides else None) for path, lora in loras.items()}
    return {**sides, **biased}


def _beyond_noise(layer: Layer) -> torch.Tensor | None:
    """Return a layer's change; None where it is none, or no more than the rounding of the files' types."""
    change, noise = layer.change()
    return change if is_noise(change, noise) is None else None


def _with_rest(curve: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Return a curve with what no rank of it reaches as its last component."""
    rest = (flat.square().sum() - curve.square().sum()).clamp(min=0).sqrt()
    return torch.cat([curve, rest[None]])


def _clamped(half: torch.Tensor, quantile: float | None) -> torch.Tensor:
    if quantile is None:
        return half
    flat = half.abs().flatten()
    bound = float(flat.kthvalue(max(1, int(quantile * flat.numel())))[0])
    return half.clamp(-bound, bound)


def extract(wanted: Extraction, options: Options) -> list[Report]:
    """Write the adapters that an extraction describes.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written; `CannotHold` where the layout has no place for
            something.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    targets = [target for target, _ in wanted.outputs]
    check_places(targets, wanted.report, wanted.plot, (wanted.tuned, wanted.base), options)
    if options.ema != "keep":
        raise RequestError(
            f"ema is {options.ema}, and plain weights are extracted (convert the model with --ema use, and extract from that)"
        )
    with ExitStack() as stack:
        with no_collection():
            sources = [stack.enter_context(open_source(path)) for path in (wanted.tuned, wanted.base)]
            tuned, base = (Places(source, options.family) for source in sources)
        if tuned.family != base.family or tuned.family is None:
            raise FamilyError(
                f"{wanted.tuned.name} is {tuned.family or 'of no known family'}, {wanted.base.name} {base.family or 'neither'} "
                "(expected two models of one family; --family says which)"
            )
        layout = layout_for(tuned.family, wanted.to or ("lycoris" if wanted.conv == "tucker" else None))
        if wanted.conv == "tucker" and "tucker" not in layout.holds:
            ways = ways_out(frozenset({"lora", "locon", "tucker"}), tuned.family)
            raise CannotHold(f"the layout {layout.name} has no place for the cores of Tucker's form", advice=ways)
        check_holds(layout, Adapter({}, family=tuned.family))
        work = _Work(wanted, options, tuned, base, layout, pick_device(options, heavy=True))
        reports, made = [], work.run()
        for (adapter, told), target in zip(made, targets, strict=True):
            written = work.written(adapter)
            plan = plan_of(written, tuple(sources), tuned.family, work.noted(told))
            reports.append(write_out(plan, written, target, options, started, "writing"))
    if not options.dry_run:
        write_told(made[0][1], wanted.report, wanted.plot, options)
    return reports

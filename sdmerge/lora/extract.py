"""Extract a LoRA from two models: the best approximation of what one changed over the other, layer by layer.

No more than a layer of each model is in memory. Ranks are fixed, or chosen over the whole model from the spectra, which takes
one more pass.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sdformats.adapters.adapter import Adapter
from sdformats.adapters.reading import check_holds
from sdformats.adapters.records import Full, LoRA, Norm
from sdformats.errors import OutputExists
from sdformats.files import open_source
from sdformats.safetensors import layout as laid_out
from sdformats.tensor import DType, Spec
from sdkernels import philox, subspace
from sdmerge.errors import FamilyError, RequestError
from sdmerge.execute import no_collection
from sdmerge.lora.convert import layout_for
from sdmerge.lora.held import Held
from sdmerge.lora.layers import Layer, bias_of, is_noise, layers_of
from sdmerge.lora.places import Places
from sdmerge.lora.refs import fold
from sdmerge.lora.shrink import Form, each, fitting
from sdmerge.lora.texts import adapter_texts
from sdmerge.policy import Notes
from sdmerge.writing import metadata_of, plan_of, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sdformats.adapters.layout import AdapterLayout, Written
    from sdformats.adapters.record import Record
    from sdmerge.execute import Report
    from sdmerge.lora.budget import Limit
    from sdmerge.options import Options

_START = 32
"""Vectors that the search starts with beyond the rank."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What is to be extracted.

    Attributes:
        tuned, base: the models.
        outputs: where to write, each with its bound on the ranks.
        conv_rank: the rank of convolutions wider than a pixel, where it is another.
        to: the layout; None: the usual one of the family.
        tolerance: how much larger than the smallest possible a layer's error may be.
        text_encoders: whether they are looked at.
        clamp: cut factors at this quantile of their magnitudes, as some scripts do; None: not at all.
        report: where to write what became of each layer, as JSON.
        plot: where to paint ranks and errors over the layers.
    """

    tuned: Path
    base: Path
    outputs: tuple[tuple[Path, Limit], ...]
    conv_rank: int | None = None
    to: str | None = None
    tolerance: float = 0.01
    text_encoders: bool = True
    clamp: float | None = None
    report: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a layer gave.

    Attributes:
        up, down: factors, √σ on both, as many as any output needs; in the output's type.
        squares: their σ².
        total: the squared norm of the change.
        best: what the largest squares of as many could add up to at most.
        method: how they were found.
    """

    up: torch.Tensor
    down: torch.Tensor
    squares: torch.Tensor
    total: float
    best: float
    method: str

    def error(self, rank: int) -> float:
        """Return ‖Δ - Δ'‖ / ‖Δ‖ at a rank."""
        return math.sqrt(max(0.0, self.total - float(self.squares[:rank].sum())) / self.total) if self.total else 0.0

    @property
    def excess(self) -> float:
        """How much larger than the smallest possible the error is at most."""
        left, least = self.total - float(self.squares.sum()), self.total - self.best
        return math.sqrt(max(0.0, left) / least) - 1 if least > 1e-9 * self.total and left > 0 else 0.0


@dataclass
class _Work:
    """An extraction under way."""

    wanted: Extraction
    options: Options
    tuned: Places
    base: Places
    layout: AdapterLayout
    notes: Notes = field(default_factory=Notes)
    quiet: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> DType:
        """The type of the factors."""
        return self.options.output_type or DType.F16

    def run(self) -> list[tuple[Adapter, dict[str, int]]]:
        """Return an adapter for each output, and its ranks; `found` keeps what the layers gave."""
        every = list(layers_of(self.tuned, self.base, text_encoders=self.wanted.text_encoders))
        matrices = {layer.path: layer for layer in every if len(layer.shape) > 1 and ".embeddings." not in layer.path}
        spectra = self._spectra(matrices) if any(not limit.rank for _, limit in self.wanted.outputs) else {}
        sides = self._sides(every)
        ranks = [self._ranks(limit, matrices, spectra, sides) for _, limit in self.wanted.outputs]
        most = {path: max(one.get(path, 0) for one in ranks) for path in matrices}
        self.found = self._factors({path: layer for path, layer in matrices.items() if most[path]}, most)
        for path, why in sorted(self.quiet.items()):
            said = "unchanged" if why == "unchanged" else "left out: its change is the rounding of the files' types"
            self.notes.add(said, path)
        return [(self._adapter(matrices, one, sides), one) for one in ranks]

    def _each(self, layers: Mapping[str, Layer], label: str, work: Callable[[Layer], None]) -> None:
        # The largest layers first: the last ones to end are small, and no thread waits long for another.
        order = sorted(layers, key=lambda path: (-layers[path].tuned.spec.numel, path))
        costs = {path: layers[path].tuned.spec.nbytes + layers[path].base.spec.nbytes for path in order}
        each(costs, lambda path: work(layers[path]), self.options, label)

    def _changed(self, layer: Layer) -> torch.Tensor | None:
        """Return a layer's change as a matrix; None, noted, where it is none."""
        change, noise = layer.change()
        why = is_noise(change, noise)
        if why is not None:
            self.quiet[layer.path] = why
            return None
        return change.flatten(1)

    def _spectra(self, layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
        """Return all singular values of every layer that changed."""
        spectra: dict[str, torch.Tensor] = {}

        def work(layer: Layer) -> None:
            change = self._changed(layer)
            if change is not None:
                small = change if change.shape[0] <= change.shape[1] else change.T
                values = torch.linalg.eigvalsh(subspace.gram(small)).flip(0).clamp(min=0)
                spectra[layer.path] = values.double().sqrt()

        self._each(layers, "looking", work)
        return {path: spectra[path] for path in layers if path in spectra}

    def _ranks(
        self,
        limit: Limit,
        layers: Mapping[str, Layer],
        spectra: Mapping[str, torch.Tensor],
        sides: Mapping[str, Record],
    ) -> dict[str, int]:
        if limit.rank is not None:
            return {
                path: min(self._rank(layer, limit.rank), layer.shape[0], layer.columns)
                for path, layer in layers.items()
            }
        if limit.size is None:
            return limit.ranks(spectra)
        forms = {path: _form(layers[path], self.dtype) for path in spectra}
        return fitting(spectra, forms, limit.size, lambda loras: self._bytes(loras, sides))

    def _rank(self, layer: Layer, rank: int) -> int:
        wide = len(layer.shape) == 4 and layer.shape[2:] != (1, 1)
        return self.wanted.conv_rank if wide and self.wanted.conv_rank is not None else rank

    def _factors(self, layers: Mapping[str, Layer], ranks: Mapping[str, int]) -> dict[str, Found]:
        found: dict[str, Found] = {}

        def work(layer: Layer) -> None:
            change = None if layer.path in self.quiet else self._changed(layer)
            if change is not None:
                found[layer.path] = self._decomposed(layer.path, change, ranks[layer.path])

        self._each(layers, "extracting", work)
        return {path: found[path] for path in layers if path in found}

    def _decomposed(self, path: str, change: torch.Tensor, rank: int) -> Found:
        tall = change.shape[0] > change.shape[1]
        small = change.T.contiguous() if tall else change
        part = subspace.leading(small, rank, _start(path, small.shape[0], rank), self.wanted.tolerance)
        left = part.vectors
        right = left.T @ small
        squares = right.double().square().sum(1)
        root = squares.sqrt().sqrt().float()
        near, far = left * root, right / root.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        up, down = (far.T, near.T) if tall else (near, far)
        stored = torch.float16 if self.dtype is DType.F16 else torch.float32
        halves = [_clamped(half, self.wanted.clamp).to(stored) for half in (up, down)]
        return Found(halves[0], halves[1], squares, part.total, max(part.best, float(squares.sum())), part.method)

    def _sides(self, every: Sequence[Layer]) -> dict[str, Record]:
        """Return changes of norms, and of biases alone, where the layout holds them; else they are noted."""
        sides: dict[str, Record] = {}
        for layer in every:
            if len(layer.shape) == 1:
                change, noise = layer.change()
                if is_noise(change, noise) is None:
                    self._side(sides, layer.path, Norm(weight=self._held(change)), "norm")
            elif ".embeddings." in layer.path:
                change, noise = layer.change()
                if is_noise(change, noise) is None:
                    self.notes.add("changed, and no part of a LoRA", layer.path)
            both = bias_of(self.tuned, self.base, layer)
            if both is None:
                continue
            change, noise = replace(layer, tuned=both[0], base=both[1]).change()
            if is_noise(change, noise) is None:
                bias = self._held(change)
                if isinstance(norm := sides.get(layer.path), Norm):
                    sides[layer.path] = replace(norm, bias=bias)
                else:
                    self._side(sides, layer.path, Full(bias=bias), "full")
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

    def _adapter(self, layers: Mapping[str, Layer], ranks: Mapping[str, int], sides: Mapping[str, Record]) -> Adapter:
        modules: dict[str, Record] = {}
        for path, found in self.found.items():
            if rank := min(ranks.get(path, 0), found.squares.numel()):
                side = sides.get(path)
                record = _form(layers[path], self.dtype).lora(rank, found.up[:, :rank], found.down[:rank])
                modules[path] = record if side is None else replace(record, bias=side.bias)
        modules |= {path: record for path, record in sides.items() if path not in modules}
        if not modules:
            raise RequestError(f"{self.wanted.tuned}: nothing changed over {self.wanted.base} but rounding")
        return Adapter(modules, metadata=self._metadata(ranks), family=self.tuned.family)

    def _metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        models = {"tuned": self.wanted.tuned.name, "base": self.wanted.base.name}
        return adapter_texts(self.tuned.family, ranks.values()) | {"sdmerge.extracted": json.dumps(models)}

    def written(self, adapter: Adapter) -> Written:
        """Return the output's tensors."""
        check_holds(self.layout, adapter)
        assert self.layout.write is not None, "check_holds refuses layouts that are only read"
        return self.layout.write(self.layout, adapter, fold)

    def _bytes(self, loras: Mapping[str, LoRA], sides: Mapping[str, Record]) -> int:
        ranks = {path: lora.rank for path, lora in loras.items()}
        made = self.written(Adapter({**loras, **sides}, metadata=self._metadata(ranks), family=self.tuned.family))
        specs = {name: ref.spec for name, ref in made.tensors.items()}
        header, _ = laid_out(specs, metadata_of(made.metadata))
        return len(header) + sum(spec.nbytes for spec in specs.values())

    def described(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return what became of each layer of the first output, for the report."""
        layers: dict[str, dict[str, Any]] = {
            path: {
                "rank": ranks[path],
                "norm": math.sqrt(found.total),
                "energy": 1 - found.error(ranks[path]) ** 2,
                "error": found.error(ranks[path]),
                "excess_at_most": found.excess,
                "method": found.method,
            }
            for path, found in self.found.items()
            if ranks.get(path)
        }
        left = math.fsum((one["norm"] * one["error"]) ** 2 for one in layers.values())
        total = math.fsum(one["norm"] ** 2 for one in layers.values())
        return {
            "error": math.sqrt(left / total) if total else 0.0,
            "layers": layers,
            "left_out": dict(sorted(self.quiet.items())),
        }


def _form(layer: Layer, dtype: DType) -> Form:
    return Form(rows=layer.shape[0], inner=layer.shape[1:], dtype=dtype)


def _start(path: str, side: int, rank: int) -> torch.Tensor:
    """Return numbers to start a search with: the same for the same layer anywhere."""
    count = side * (rank + _START)
    words = philox.Stream(philox.key(0, path), count).take(0, count)
    return torch.from_numpy(words.view("int32").astype("float32")).reshape(side, -1) * 2.0**-31


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
    for path in (wanted.report, wanted.plot, *(target for target, _ in wanted.outputs)):
        if path is not None and path.exists() and not options.overwrite:
            raise OutputExists("exists already", path=path, advice="pass --overwrite, or choose another name")
    with ExitStack() as stack:
        with no_collection():
            sources = [stack.enter_context(open_source(path)) for path in (wanted.tuned, wanted.base)]
            tuned, base = (Places(source, options.family) for source in sources)
        if tuned.family != base.family or tuned.family is None:
            raise FamilyError(
                f"{wanted.tuned.name} is {tuned.family or 'of no known family'}, {wanted.base.name} {base.family or 'neither'} "
                "(expected two models of one family; --family says which)"
            )
        layout = layout_for(tuned.family, wanted.to)
        work = _Work(wanted, options, tuned, base, layout)
        made = work.run()
        told = work.described(made[0][1])
        work.notes.add(f"relative error {told['error']:.4g} over {len(told['layers']):,} layers, as {layout.name}")
        reports = []
        for (adapter, _), (target, _) in zip(made, wanted.outputs, strict=True):
            written = work.written(adapter)
            plan = plan_of(written, tuple(sources), tuned.family, work.notes)
            reports.append(write_out(plan, written, target, options, started, "writing"))
    if not options.dry_run:
        if wanted.report is not None:
            wanted.report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if wanted.plot is not None:
            from sdmerge.lora.rank_plot import paint

            paint(wanted.plot, told["layers"])
    return reports

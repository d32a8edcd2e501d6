"""Merge the deltas of several concepts in closed form (Kumari 2023, "Multi-Concept Customization of Text-to-Image Diffusion").

For a key or value matrix W of the model, with C = KᵀK over the features K of captions of everything else, T the features of
the concepts' prompts, and V what each concept's own matrix makes of them, the merged matrix changes least over the captions
while it makes V of T:

    W' = argmin ‖(W' - W) Kᵀ‖   with   W' Tᵀ = Vᵀ
       = W + (Vᵀ - W Tᵀ) (T C⁻¹ Tᵀ)⁻¹ T C⁻¹

What stands behind the brackets, P, is the same for all layers. It comes from two QR decompositions, K = Q R and
R⁻ᵀ Tᵀ = Q' R', as P = R'⁻¹ Q'ᵀ R⁻ᵀ, so that no condition number is squared; all in float64. Where prompts have a token in
common that no concept has changed the features of ("photo of a"), it counts once, and V is the average of their outputs.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from sdformats.custom_diffusion.delta import CustomDiffusion
from sdformats.tensor import Spec
from sdmerge.custom.captions import captions
from sdmerge.custom.compress import KEYS_AND_VALUES
from sdmerge.custom.features import Reader
from sdmerge.custom.forms import layout_for, open_base, open_delta, weight_in, whole, write_form
from sdmerge.errors import FamilyError, MismatchError, RequestError
from sdmerge.execute import no_collection
from sdmerge.lora.refs import Computed
from sdmerge.policy import Notes
from sdmerge.train.settings import ModelSettings
from sdmerge.writing import plan_of, typed, write_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdformats.layout import Detection
    from sdformats.tensor import TensorSource
    from sdformats.views import Ref
    from sdmerge.execute import Report
    from sdmerge.options import Options

PROMPTS = ("{} {}", "photo of a {} {}")
"""What is asked of a concept: its word, its class."""
_SAME = 1e-6
"""Features closer than this part of their length are those of one token."""
_DEPENDENT = 1e-9
"""A diagonal of R smaller than this part of the largest means that there are too few captions."""


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What is to be merged.

    Attributes:
        deltas: files or folders, each with the class of its concept: ``cat``.
        base: the model that they are for, with its text encoder.
        captions: a file with captions of everything else, one a line; None: 200 plain ones.
        to: the form to write; None: that of the first.
        model_config, tokenizer: see `sdmerge.train.settings.ModelSettings`.
    """

    deltas: tuple[tuple[Path, str], ...]
    base: Path
    captions: Path | None = None
    to: str | None = None
    model_config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Plane:
    """Where all merged matrices are held fast.

    Attributes:
        features: T, [t, width].
        project: P, [t, width].
        owners: for each concept, which rows of T are features of its prompts.
    """

    features: Tensor
    project: Tensor
    owners: tuple[Tensor, ...]


@dataclass
class Residual:
    """How far the merged matrices are from what they are to make: the largest ‖W' Tᵀ - Vᵀ‖ / ‖Vᵀ‖ of all."""

    largest: float = 0.0


def merge_concepts(wanted: Concepts, target: Path, options: Options) -> Report:
    """Write the merge of some concepts.

    Raises:
        sdformats.errors.FormatError: a file cannot be read or written.
        sdmerge.errors.SdmergeError: the request cannot be fulfilled.
    """
    started = time.perf_counter()
    if len(wanted.deltas) < 2:
        raise RequestError("one delta is no merge (expected two or more)")
    notes = Notes()
    residual = Residual()
    with ExitStack() as stack:
        with no_collection():
            opened = [open_delta(stack, path, options) for path, _ in wanted.deltas]
            family = _family_of([seen for _, _, seen in opened])
            records = _named_apart([record for _, record, _ in opened], notes)
            for (path, _), record in zip(wanted.deltas, records, strict=True):
                _check(record, path)
            places = open_base(stack, wanted.base, family)
            layout = layout_for(wanted.to, opened[0][0], opened[0][2], target)
        held = _plane(wanted, places.source, records, options)
        merge = partial(merged_weight, held=held, residual=residual)
        names = dict.fromkeys(name for record in records for name in record.weights)
        weights = {name: _merged(name, weight_in(places, name), records, merge) for name in names}
        words = {word: vectors for record in records for word, vectors in record.words.items()}
        result = CustomDiffusion(weights, words)
        written = typed(write_form(result, layout, target, notes, allow_loss=False), options.output_type)
        sources = (*(source for source, _, _ in opened), places.source)
        plan = plan_of(written, sources, family, notes)
        report = write_out(plan, written, target, options, started, "merging")
    if not report.written:
        return report
    said = f"{len(weights)} matrices make of {len(held.features)} tokens what each concept's own made, to {residual.largest:.1e}"
    return replace(report, notes=(*report.notes, said))


def _family_of(found: Sequence[Detection]) -> str | None:
    families = {seen.family for seen in found if seen.family}
    if len(families) > 1:
        raise FamilyError(f"the deltas are for different families: {', '.join(sorted(families))}")
    return next(iter(families), None)


def _merged(name: str, base: Ref, records: Sequence[CustomDiffusion], merge: Callable[..., Tensor]) -> Computed:
    """Return a weight that is merged of the model's and all concepts', in the type of the first delta that has it."""
    own = [whole(record.weights.get(name), base) for record in records]
    kind = next(one for record, one in zip(records, own, strict=True) if name in record.weights)
    return Computed(merge, (base, *own), Spec(base.shape, kind.spec.dtype))


def _check(record: CustomDiffusion, path: Path) -> None:
    others = [name for name in record.weights if not name.endswith(KEYS_AND_VALUES)]
    if others:
        raise RequestError(
            f"{path}: changes {others[0]} (expected keys and values alone, which are functions of the text)"
        )
    if record.text_encoder:
        raise RequestError(f"{path}: has a text encoder of its own, and one model has one for all concepts")
    if not record.words:
        raise RequestError(
            f"{path}: has no word for its concept (of diffusers' form give the folder, where its words are files)"
        )


def _named_apart(records: Sequence[CustomDiffusion], notes: Notes) -> list[CustomDiffusion]:
    """Give words that several deltas have other names."""
    taken: dict[str, None] = {}
    found = []
    for number, record in enumerate(records, 1):
        words = {}
        for word, vectors in record.words.items():
            name = word
            while name in taken:
                name = (
                    f"<new{len(taken) + 1}>"
                    if f"<new{len(taken) + 1}>" not in taken
                    else f"<{number}-{name.strip('<>')}>"
                )
            if name != word:
                notes.add(f"the word {word} of delta {number} is called {name}, as another delta has it too")
            taken[name] = None
            words[name] = vectors
        found.append(replace(record, words=words))
    return found


def _plane(wanted: Concepts, base: TensorSource, records: Sequence[CustomDiffusion], options: Options) -> Plane:
    """Read all prompts and captions through the model's own text encoder, with the new words in it."""
    words = {word: vectors for record in records for word, vectors in record.words.items()}
    chosen = ModelSettings(
        model=str(wanted.base),
        tokenizer=None if wanted.tokenizer is None else str(wanted.tokenizer),
        model_config=None if wanted.model_config is None else str(wanted.model_config),
        family=options.family,
    )
    reader = Reader(base, chosen, words)
    prompts = [
        [prompt.format(" ".join(record.words), name) for prompt in PROMPTS]
        for record, (_, name) in zip(records, wanted.deltas, strict=True)
    ]
    return plane(reader.features(captions(wanted.captions)), [reader.features(one) for one in prompts])


def plane(everything: Tensor, concepts: Sequence[Tensor]) -> Plane:
    """Return T and P; see the module.

    Args:
        everything: K, the features of captions, [n, width], float64.
        concepts: the features of each concept's prompts, [m, width], float64.

    Raises:
        RequestError: there are too few captions, or two concepts cannot be told apart.
    """
    rows: list[Tensor] = []
    owners: list[Tensor] = []
    for features in concepts:
        indices: dict[int, None] = {}
        for row in features:
            index = next((i for i, one in enumerate(rows) if (one - row).norm() <= _SAME * row.norm()), len(rows))
            if index == len(rows):
                rows.append(row)
            indices[index] = None
        owners.append(torch.tensor(list(indices)))
    together = torch.stack(rows)
    if len(everything) < everything.shape[1] or _dependent(known := torch.linalg.qr(everything, mode="r")[1]):
        raise RequestError(
            f"the captions are too few or too much alike: {len(everything):,} tokens for {everything.shape[1]:,} dimensions; "
            "give more and longer ones, with --captions"
        )
    left = torch.linalg.solve_triangular(known.T, together.T, upper=False)  # R⁻ᵀ Tᵀ
    basis, triangle = torch.linalg.qr(left)
    if _dependent(triangle):
        raise RequestError("the prompts of the concepts cannot be told apart; are two words the same?")
    right = torch.linalg.solve_triangular(known, basis, upper=True)  # R⁻¹ Q'
    project = torch.linalg.solve_triangular(triangle, right.T, upper=True)
    return Plane(together, project, tuple(owners))


def _dependent(triangle: Tensor) -> bool:
    sizes = triangle.diagonal().abs()
    return bool(sizes.min() <= _DEPENDENT * sizes.max())


def merged_weight(base: Tensor, *own: Tensor, held: Plane, residual: Residual) -> Tensor:
    """Return W'; see the module.

    Args:
        base: W, [out, width].
        own: each concept's.
        held: T and P.
        residual: takes note of how well it is met.

    Returns:
        [out, width], float64.

    Raises:
        MismatchError: the text encoder's features have another width.
    """
    weight = base.double()
    if weight.shape[1] != held.features.shape[1]:
        raise MismatchError(f"the text is {held.features.shape[1]} wide, and the model reads {weight.shape[1]}")
    wanted = torch.zeros(len(held.features), len(weight), dtype=torch.float64)
    counts = torch.zeros(len(held.features), 1, dtype=torch.float64)
    for matrix, rows in zip(own, held.owners, strict=True):
        wanted[rows] += held.features[rows] @ matrix.double().T
        counts[rows] += 1
    wanted /= counts
    merged = weight + (wanted - held.features @ weight.T).T @ held.project
    missed = (held.features @ merged.T - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny)
    residual.largest = max(residual.largest, float(missed))
    return merged

"""Hypernetworks folded into a model's weights.

A linear hypernetwork reads x + s (M x + b) where a layer read x. So keys are W_k (I + s M_k) x and a constant that softmax
does not see, values W_v (I + s M_v) x + s W_v b, and as the weights of attention add up to 1, that last term comes out of
the layer as s W_o W_v b:

    W_k ← W_k (I + s M_k)        W_v ← W_v (I + s M_v)        b_o ← b_o + s W_o W_v b

Several follow each other, as in the programs that load them: the second reads what the first has made.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from sdformats.adapters import names
from sdformats.adapters.adapter import Adapter
from sdformats.adapters.records import Full, InputMap
from sdformats.hypernetwork import Hypernetwork, Linear
from sdformats.tensor import DType, Spec
from sdmerge.errors import FamilyError, MismatchError, NonFiniteInput, RequestError
from sdmerge.lora.held import Held
from sdmerge.lora.refs import Computed, value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from sdformats.adapters.record import Record
    from sdformats.hypernetwork import Network
    from sdformats.views import Ref
    from sdmerge.lora.places import Places
    from sdmerge.policy import View

    StrengthOf = Callable[[str], float]
    Added = Iterable[tuple[Adapter | Hypernetwork, StrengthOf]]

_KEY, _VALUE = 0, 1


def with_folds(places: Places, added: Added) -> Iterator[tuple[Adapter, StrengthOf]]:
    """Yield adapters as they are, and all hypernetworks as one adapter that holds its strengths.

    Raises:
        RequestError: a hypernetwork is not linear, or changes what an adapter changes too.
        MismatchError: the model has no layer of a hypernetwork's width.
    """
    folded: list[tuple[Hypernetwork, StrengthOf]] = []
    changed: dict[str, None] = {}
    for one, strength in added:
        if isinstance(one, Hypernetwork):
            folded.append((one, strength))
            continue
        changed |= dict.fromkeys(one.modules)
        yield one, strength
    if not folded:
        return
    fold = _Fold(places, folded).adapter()
    both = next((path for path in fold.modules if path in changed), None)
    if both is not None:
        raise RequestError(
            f"an adapter and a hypernetwork both change {both}, and the second reads what the first makes: bake the adapter "
            "first, and the hypernetwork into the result"
        )
    yield fold, lambda _name: 1.0


def check_plain(view: View) -> None:
    """Refuse weights that are to be read otherwise than as they are stored: the fold takes them so.

    Raises:
        RequestError: a moving average is used, or fp8 weights have factors.
    """
    for name, read in view.tensors.items():
        if ".to_" in name and (read.key != name or read.scale is not None):
            raise RequestError(
                f"{read}: is not used as it is stored; write the model with plain weights first (sdmerge convert with --ema or "
                "--dtype), and fold the hypernetwork into that"
            )


class _Fold:
    """What some hypernetworks amount to in one model."""

    def __init__(self, places: Places, folded: Sequence[tuple[Hypernetwork, StrengthOf]]) -> None:
        self._places = places
        self._strengths = [strength for _, strength in folded]
        self._maps = [_maps(one) for one, _ in folded]

    def adapter(self) -> Adapter:
        """Return the changes of every layer."""
        if self._places.family in ("sd3", "flux"):
            raise FamilyError(
                f"{self._places.source.path}: is {self._places.family}, for which there are no hypernetworks"
            )
        modules: dict[str, Record] = {}
        met: set[int] = set()
        for layer in names.unet():
            if layer.endswith((".attn1.to_k", ".attn2.to_k")):
                met.add(self._layer(f"unet.{layer.removesuffix('to_k')}", modules))
        for maps in self._maps:
            strangers = sorted({width for width, _ in maps} - met)
            if strangers:
                raise MismatchError(
                    f"{self._places.source.path}: has no attention layer that reads a width of {strangers[0]}, and the "
                    f"hypernetwork has (its layers read {', '.join(map(str, sorted(met - {0})))})"
                )
        return Adapter(modules, family=self._places.family)

    def _layer(self, attention: str, modules: dict[str, Record]) -> int:
        """Add the changes of one layer; return the width that it reads, 0 where there is no such layer."""
        key, val, out = (self._places.weight(f"{attention}{name}") for name in ("to_k", "to_v", "to_out.0"))
        if key is None or val is None or out is None:
            return 0
        width = key.shape[1]
        for side, name in ((_KEY, "to_k"), (_VALUE, "to_v")):
            found = self._at(width, side, f"{attention}{name}")
            if found:
                matrix = Computed(partial(_matrix, [s for s, *_ in found]), tuple(m for _, m, _ in found),
                                  Spec((width, width), DType.F32))  # fmt: skip
                modules[f"{attention}{name}"] = InputMap(matrix=matrix)
        found = self._at(width, _VALUE, f"{attention}to_v")
        if found:
            parts = tuple(ref for _, m, b in found for ref in (m, b))
            bias = Computed(partial(_bias, [s for s, *_ in found]), (out, val, *parts), Spec(out.shape[:1], DType.F32))
            modules[f"{attention}to_out.0"] = Full(bias=bias)
        return width

    def _at(self, width: int, side: int, path: str) -> list[tuple[float, Ref, Ref]]:
        """Return strength, matrix and bias of every hypernetwork that changes one module, the first to be used first."""
        place = self._places.find(path)
        assert place is not None, "found before"
        found = []
        for maps, strength in zip(self._maps, self._strengths, strict=True):
            amount = strength(place.weight)
            if (width, side) in maps and amount != 0:
                found.append((amount, *maps[width, side]))
        return found


def _maps(record: Hypernetwork) -> dict[tuple[int, int], tuple[Ref, Ref]]:
    """Return M (width, width) and b (width,) for each width and side.

    Raises:
        RequestError: it is more than linear maps.
        NonFiniteInput: it holds NaN or infinity.
    """
    if record.bends is not None:
        raise RequestError(
            f"the hypernetwork is not linear ({record.bends}), so no weights can hold what it does; load it beside the model"
        )
    return {
        (width, side): _map(network)
        for width, pair in record.networks.items()
        for side, network in ((_KEY, pair[0]), (_VALUE, pair[1]))
    }


def _map(network: Network) -> tuple[Ref, Ref]:
    """Multiply layers of (weight, bias) out, in float64."""
    matrix: Tensor | None = None
    shift: Tensor | None = None
    for slot in network:
        if not isinstance(slot, Linear):
            continue  # dropout, which does nothing when it is used
        weight, bias = value(slot.weight).double(), value(slot.bias).double()
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise NonFiniteInput(f"{slot.weight}: holds NaN or infinity, or its bias does")
        matrix = weight if matrix is None else weight @ matrix
        shift = bias if shift is None else weight @ shift + bias
    assert matrix is not None, "a structure has a layer"
    assert shift is not None, "a structure has a layer"
    return tuple(Held(one.float(), Spec(tuple(one.shape), DType.F32)) for one in (matrix, shift))  # type: ignore[return-value]


def _matrix(strengths: Sequence[float], *matrices: Tensor) -> Tensor:
    """Return H of x + H x + … for maps that follow each other: I + H = (I + sₙ Mₙ) … (I + s₁ M₁)."""
    total = strengths[0] * matrices[0]
    for strength, matrix in zip(strengths[1:], matrices[1:], strict=True):
        total = total + strength * (matrix + matrix @ total)
    return total


def _bias(strengths: Sequence[float], out: Tensor, val: Tensor, *parts: Tensor) -> Tensor:
    """Return W_o W_v c, where c is what maps that follow each other add to 0."""
    shift = torch.zeros_like(parts[1])
    for strength, matrix, bias in zip(strengths, parts[::2], parts[1::2], strict=True):
        shift = shift + strength * (matrix @ shift + bias)
    return out @ (val @ shift)

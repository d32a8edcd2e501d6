"""Agreement with sd-mecha 1.1.8: its own functions on the same tensors, within 1e-5. Run by `make conformance`.

Its random methods are given our masks. What it does otherwise, and why, is said in the docstrings of our methods; here the
tests that need it say what they avoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import sdkernels
from sdmerge.attention import siblings
from sdmerge.method import Place, find

if TYPE_CHECKING:
    import numpy as np

pytest.importorskip("sd_mecha", reason="sd-mecha is not installed; make conformance does that")
mecha: Any = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods")

PLACE = Place("model.diffusion_model.weight")
NEAR = 1e-5
SHAPES = ((64,), (24, 17), (8, 5, 3, 3))
ALPHAS = (0.0, 0.3, 0.5, 0.8, 1.0)
SLICES = ((0.5, 0.0), (0.3, 0.2), (0.5, 0.7), (1.0, 0.0), (0.0, 0.4))

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def models(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return models that share half of what they learned over the last of them, their base."""
    source = torch.Generator().manual_seed(sum(shape))
    base, lean, *own = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(count + 1))
    return [*((base + 0.3 * (lean + x)).to(dtype) for x in own), base.to(dtype)]


def theirs(function: Any, *tensors: Any, **parameters: Any) -> torch.Tensor:
    """Run sd-mecha's function on copies (some write to their inputs); numbers it wants as tensors are given so."""
    plain = function.__wrapped__
    alpha = {"alpha": torch.tensor(parameters.pop("alpha"), dtype=tensors[0].dtype)} if "alpha" in parameters else {}
    result: torch.Tensor = plain(*(x.clone() for x in tensors), **alpha, **parameters)
    return result


def keyed(function: Any, *tensors: torch.Tensor, **parameters: Any) -> torch.Tensor:
    """Run one of those that take whole models."""
    plain = function.__wrapped__
    alpha = {"alpha": torch.tensor(parameters.pop("alpha"), dtype=tensors[0].dtype)} if "alpha" in parameters else {}
    result: torch.Tensor = plain(*({"w": x.clone()} for x in tensors), key="w", **alpha, **parameters)
    return result


def ours(name: str, *tensors: torch.Tensor, base: torch.Tensor | None = None, **values: Any) -> torch.Tensor:
    """Run our method as the runner does."""
    method = find(name)
    extra: dict[str, Any] = {} if base is None else {"base": base}
    if method.takes_place:
        extra["place"] = PLACE
    return method.function(*tensors, **extra, **method.check(len(tensors), values))


def apart(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the larger of two distances: of the whole tensors, over their norm, and of any element, over 1 + its size."""
    assert result.shape == expected.shape
    difference = result - expected
    whole, most = difference.norm() / expected.norm(), (difference.abs() / (1 + expected.abs())).max()
    return float(torch.stack([whole, most]).max())


@each_shape
@each_alpha
def test_weighted_sum(shape: tuple[int, ...], alpha: float) -> None:
    a, b = models(shape, 2)
    assert apart(ours("weighted_sum", a, b, alpha=alpha), keyed(mecha.weighted_sum, a, b, alpha=alpha)) < NEAR


@each_shape
@pytest.mark.parametrize("count", [2, 3, 5])
def test_n_average(shape: tuple[int, ...], count: int) -> None:
    tensors = models(shape, count)
    assert apart(ours("linear", *tensors), keyed(mecha.n_average, *tensors)) < NEAR


@each_shape
@each_alpha
def test_add_difference(shape: tuple[int, ...], alpha: float) -> None:
    a, b, c = models(shape, 3)
    change = theirs(mecha.subtract, b, c)
    expected = keyed(mecha.linear.add_difference, a, change, alpha=alpha)
    assert apart(ours("add_difference", a, b, c, alpha=alpha), expected) < NEAR


@each_shape
@each_alpha
def test_slerp(shape: tuple[int, ...], alpha: float) -> None:
    a, b = models(shape, 2)
    expected = theirs(mecha.slerp, a, b, alpha=alpha)
    # Ours, as mergekit's, takes the inputs in their lengths; sd-mecha takes unit vectors, and blends the lengths apart.
    length = torch.lerp(a.norm(), b.norm(), alpha)
    assert apart(length * ours("slerp", a / a.norm(), b / b.norm(), t=alpha), expected) < NEAR


@each_shape
@each_alpha
def test_perpendicular(shape: tuple[int, ...], alpha: float) -> None:
    a, b, c = models(shape, 3)
    part = theirs(mecha.perpendicular_component, a - c, b - c)
    assert apart(ours("perpendicular", a, b, c, alpha=alpha), a + alpha * part) < NEAR


@each_shape
@each_alpha
@pytest.mark.parametrize("name", ["train_difference", "add_opposite", "add_strict_opposite"])
def test_masks(shape: tuple[int, ...], alpha: float, name: str) -> None:
    a, b, c = models(shape, 3)
    b.view(-1)[:5] = c.view(-1)[:5]
    a.view(-1)[3:8] = c.view(-1)[3:8]
    a.view(-1)[8:12] = b.view(-1)[8:12]
    expected = a + theirs(getattr(mecha, f"{name}_mask"), a, b, c, alpha=alpha) * (b - c)
    assert apart(ours(name, a, b, c, alpha=alpha), expected) < NEAR


@each_shape
@each_alpha
def test_geometric(shape: tuple[int, ...], alpha: float) -> None:
    a, b = models(shape, 2)
    assert apart(ours("geometric", a, b, alpha=alpha), theirs(mecha.geometric_sum, a, b, alpha=alpha)) < NEAR


@each_shape
@each_alpha
def test_multiply_quotient(shape: tuple[int, ...], alpha: float) -> None:
    """In float64, where sd-mecha's logarithms are precise too."""
    a, b, c = models(shape, 3, torch.float64)
    a.view(-1)[:5] = c.view(-1)[:5]
    b.view(-1)[3:8] = c.view(-1)[3:8]
    expected = theirs(mecha.multiply_quotient, a, b, c, alpha=alpha)
    assert apart(ours("multiply_quotient", a, b, c, alpha=alpha), expected) < NEAR


@each_shape
@pytest.mark.parametrize("stiffness", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bounds", [2, 3, 4])
def test_clamp(shape: tuple[int, ...], stiffness: float, bounds: int) -> None:
    tensors = models(shape, bounds + 1)
    expected = theirs(mecha.clamp, *tensors, stiffness=stiffness)
    assert apart(ours("clamp", *tensors, stiffness=stiffness), expected) < NEAR


@each_shape
@each_alpha
@pytest.mark.parametrize("kind", ["a", "b"])
def test_cosine(shape: tuple[int, ...], alpha: float, kind: str) -> None:
    a, b = models(shape, 2)
    expected = theirs(getattr(mecha, f"add_cosine_{kind}"), a, b, alpha=alpha)
    assert apart(ours(f"cosine_{kind}", a, b, alpha=alpha), expected) < NEAR


@each_shape
@each_alpha
@pytest.mark.parametrize("tilt", [0.0, 0.3, 1.0, 1.6])
def test_crossover(shape: tuple[int, ...], alpha: float, tilt: float) -> None:
    a, b = models(shape, 2)
    expected = mecha.crossover.__wrapped__(a, b, alpha=alpha, tilt=tilt)
    assert apart(ours("crossover", a, b, alpha=alpha, tilt=tilt), expected) < NEAR


@each_shape
@pytest.mark.parametrize("name", ["tensor_sum", "top_k_tensor_sum"])
@pytest.mark.parametrize(("width", "offset"), SLICES)
def test_slices(shape: tuple[int, ...], name: str, width: float, offset: float) -> None:
    a, b = models(shape, 2)
    expected = theirs(getattr(mecha.slicing, name), a, b, width=width, offset=offset)
    assert apart(ours(name, a, b, width=width, offset=offset), expected) < NEAR


@each_shape
@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("count", [2, 3])
def test_ties(shape: tuple[int, ...], density: float, vote: str, count: int) -> None:
    """sd-mecha keeps one element more than the density says, but for 1; of an even count of signs it makes nothing."""
    *tensors, base = models(shape, count + 1)
    size = base.numel()
    kept = min(size, size - int((1 - density) * size) + 1)
    change = theirs(mecha.ties_sum, *(x - base for x in tensors), k=density, vote_sgn=vote == "sum")
    result = ours("ties", *tensors, base=base, density=(kept + 0.5) / size if kept < size else 1.0, vote=vote)
    trimmed = [x - base for x in tensors]
    trimmed = [d * (d.abs() >= d.abs().flatten().sort(descending=True).values[kept - 1]) for d in trimmed]
    assert apart(*but_even(vote, trimmed, result, base + change)) < NEAR


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_with_dropout(vote: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With apply_stock, which in sd-mecha turns the model stock ratio off."""
    *tensors, base = models((24, 17), 4)
    keys = iter(sdkernels.philox.key(7, f"{PLACE.name}#{i}") for i in range(3))
    monkeypatch.setattr(
        mecha.ties, "find_della_dropout", lambda delta, *_: (uniform(delta.shape, next(keys)) < density).float()
    )
    change = theirs(
        mecha.ties_sum_with_dropout, *(x - base for x in tensors),
        probability=1 - density, k=1.0, vote_sgn=vote == "sum", apply_stock=True,
    )  # fmt: skip
    result = ours("dare_ties", *tensors, base=base, density=density, vote=vote, normalize=True, seed=7)
    names = [sdkernels.philox.key(7, f"{PLACE.name}#{i}") for i in range(3)]
    kept = [(x - base) * (uniform(x.shape, key) < density) for x, key in zip(tensors, names, strict=True)]
    assert apart(*but_even(vote, kept, result, base + change)) < NEAR


def but_even(
    vote: str, changes: list[torch.Tensor], result: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both without the elements where as many models voted + as -: ours, like mergekit, goes to +, sd-mecha to 0."""
    if vote == "sum":
        return result, expected
    even = torch.stack([change.sign() for change in changes]).sum(0) == 0
    assert not even.all()
    return result[~even], expected[~even]


def uniform(shape: tuple[int, ...], key: tuple[int, int]) -> torch.Tensor:
    """Return the numbers that our methods draw."""
    return sdkernels.philox.uniform(torch.Size(shape).numel(), key).reshape(shape)


class OurNumbers:
    """Stands for numpy's generator: every mask is the one that our method draws for the next model."""

    def __init__(self, seed: int) -> None:
        self._keys = iter(sdkernels.philox.key(seed, f"{PLACE.name}#{i}") for i in range(9))

    def binomial(self, n: int, p: float, size: tuple[int, ...]) -> np.ndarray:
        assert n == 1
        return (uniform(size, next(self._keys)) < p).numpy()


@each_shape
@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize("rescale", [True, False])
def test_dropout(shape: tuple[int, ...], density: float, rescale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, base = models(shape, 4)
    monkeypatch.setattr(mecha.ties.np.random, "default_rng", OurNumbers)
    plain = mecha.ties.dropout.__wrapped__
    change = plain(*(x - base for x in tensors), probability=1 - density, rescale=float(rescale), seed=3)
    result = ours("dropout", *tensors, base=base, density=density, alpha=0.7, rescale=rescale, seed=3)
    assert apart(result, base + 0.7 * change) < NEAR


def test_dropout_of_theirs_knows_independent_models_only() -> None:
    *tensors, base = models((24, 17), 4)
    for overlap in (0.0, 0.5):
        with pytest.raises(TypeError):
            mecha.ties.dropout.__wrapped__(*(x - base for x in tensors), overlap=overlap, seed=3)


@pytest.mark.parametrize("shape", [(64,), (24, 17)], ids=str)
def test_model_stock(shape: tuple[int, ...]) -> None:
    """Of two models, and no convolutions: sd-mecha takes neighbouring pairs only, and rows of the last dimension."""
    *tensors, base = models(shape, 3)
    change = theirs(mecha.model_stock, *(x - base for x in tensors))
    assert apart(ours("model_stock", *tensors, base=base, filter_wise=True), base + change) < NEAR


@each_shape
@pytest.mark.parametrize("count", [2, 3, 5])
def test_geometric_median(shape: tuple[int, ...], count: int) -> None:
    """In float64: in float32 sd-mecha stops where the sum of distances is flat, some 5e-5 away."""
    tensors = models(shape, count, torch.float64)
    assert apart(ours("geometric_median", *tensors), theirs(mecha.geometric_median, *tensors)) < NEAR


@pytest.mark.parametrize("shape", [(64,), (24, 17), (12, 12), (8, 5, 3, 3), (24, 17, 1, 1)], ids=str)
@pytest.mark.parametrize("alignment", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("centralization", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_rotate(shape: tuple[int, ...], alignment: float, alpha: float, centralization: float) -> None:
    """Not for wide matrices, where what sd-mecha applies is no orthogonal transform; in float64, as ours computes."""
    a, b = models(shape, 2, torch.float64)
    values = {"alignment": alignment, "alpha": alpha, "centralization": centralization}
    assert apart(ours("rotate", a, b, **values), keyed(mecha.svd.rotate, a, b, **values)) < NEAR


def test_rotate_of_theirs_lengthens_wide_matrices() -> None:
    a, b = models((5, 9), 2, torch.float64)
    lengths = [
        (x - x.mean(0)).norm()
        for x in (a, ours("rotate", a, b), keyed(mecha.svd.rotate, a, b, alignment=1.0, alpha=0.0))
    ]
    torch.testing.assert_close(lengths[1], lengths[0])
    assert lengths[2] > 1.02 * lengths[0]


@pytest.mark.parametrize("shape", [(64,), (24, 17), (8, 5, 3, 3), (6, 40)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 4, 100])
def test_truncate_rank(shape: tuple[int, ...], rank: int) -> None:
    a, base = models(shape, 2)
    change = theirs(mecha.truncate_rank, a - base, rank=rank, use_approximate_basis=False)
    assert apart(ours("truncate_rank", a, base=base, rank=rank), base + change) < NEAR


def attention(kind: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an attention of SDXL with two heads, in the order in which sd-mecha takes them."""
    names = {
        "unet": ("to_k.weight", "to_out.0.weight", "to_q.weight", "to_v.weight"),
        "clip_l": (
            "k_proj.bias", "k_proj.weight", "out_proj.weight",
            "q_proj.bias", "q_proj.weight", "v_proj.bias", "v_proj.weight",
        ),
        "clip_g": ("in_proj_bias", "in_proj_weight", "out_proj.weight"),
    }[kind]  # fmt: skip
    stem = {
        "unet": "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.",
        "clip_l": "conditioner.embedders.0.transformer.text_model.encoder.layers.3.self_attn.",
        "clip_g": "conditioner.embedders.1.model.transformer.resblocks.7.attn.",
    }[kind]
    source = torch.Generator().manual_seed(len(kind))
    found = {}
    for name in names:
        rows = 384 if "in_proj" in name else 128
        shape = (rows,) if name.endswith("bias") else (rows, 128)
        found[stem + name] = torch.randn(shape, generator=source, dtype=torch.float64)
    return found


@pytest.mark.parametrize("kind", ["unet", "clip_l", "clip_g"])
def test_balance_attention(kind: str) -> None:
    """Theirs exchanges the energies, which is our α = 1."""
    from sd_mecha.extensions.builtin.merge_methods.balance_attention import algorithms, sdxl_sgm

    tensors = attention(kind)
    q, k, v, out = sdxl_sgm.extract_qkvo_sdxl_sgm(tensors, tuple(tensors))
    made = (*algorithms.balance_head_energy(q, k), *algorithms.balance_head_energy(v, out))
    expected = sdxl_sgm.return_qkvo_sdxl_sgm(*made, tuple(tensors))
    for name, x in tensors.items():
        beside = [{other: tensors[other] for other in siblings(name, tensors) or ()}]
        place = Place(name, 0, "sdxl")
        result = find("balance_attention").function(x, beside=beside, place=place, alpha=1.0)
        assert apart(result, expected[name]) < NEAR


def test_nothing_of_theirs_is_forgotten() -> None:
    """Every method of sd-mecha's that computes on tensors is compared above, or named here with the reason."""
    compared = {
        "weighted_sum", "n_average", "slerp", "subtract", "perpendicular_component", "train_difference_mask",
        "add_opposite_mask", "add_strict_opposite_mask", "geometric_sum", "multiply_quotient", "clamp", "add_cosine_a",
        "add_cosine_b", "crossover", "top_k_tensor_sum", "tensor_sum", "copy_region", "truncate_rank", "rotate", "ties_sum",
        "ties_sum_with_dropout", "model_stock", "geometric_median", "dropout", "add_difference", "add_perpendicular",
        "add_difference_ties", "add_ties_with_dare", "n_model_stock", "balance_attention",
    }  # fmt: skip
    otherwise = {
        "ties_sum_extended", "add_difference_ties_extended",  # its model stock switch is turned round
        "exchange_ema",  # which weights are read, not how they are merged
        "rebasin", "randperm",  # permutations of a whole network
        "get_rank_from_ratio",  # a number, not a tensor
        "fallback", "cast", "get_dtype", "get_device", "pick_component", "omit_component", "stack", "omit_non_finite",
        "cast_dtype_map", "cast_dtype_map_reversed",  # its own plumbing
    }  # fmt: skip
    known = {name for name, value in vars(mecha).items() if not name.startswith("_") and callable(value)}
    assert not known - compared - otherwise
    assert all(hasattr(mecha, name) for name in compared | otherwise)

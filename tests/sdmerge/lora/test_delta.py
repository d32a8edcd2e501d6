"""What each algorithm changes, against the modules of LyCORIS and the merging of PEFT; and the exact changes of algorithm.

LyCORIS applies the scale of LoHa and LoKr twice when it merges, but not when it computes: its forward is the judge.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdformats.adapters.errors import CannotHold
from sdformats.adapters.records import IA3, OFT, GLoRA, InputOFT, LoRA, Rows
from sdformats.adapters.roles import assemble
from sdmerge.errors import MismatchError
from sdmerge.lora.algebra import as_full, as_lora
from sdmerge.lora.delta import delta, needs_weight
from sdmerge.lora.refs import value
from tests.formats.adapters.memory import Memory
from tests.sdmerge.lora.lycoris_cases import CASES, made

if TYPE_CHECKING:
    from sdformats.adapters.record import Record
    from sdformats.views import Ref


def record_of(tensors: dict[str, Tensor]) -> Record:
    """Return the record that a file with these tensors would give."""
    memory = Memory()
    return assemble("module", {name: memory.add(tensor.numpy()) for name, tensor in tensors.items()})


def double(ref: Ref) -> Tensor:
    """Return a tensor in float64."""
    return value(ref).double()


@pytest.mark.parametrize("name", CASES)
def test_a_layer_computes_what_lycoris_computes(name: str) -> None:
    modules = pytest.importorskip("lycoris.modules")
    kind, layer, tensors = made(name)
    record = record_of(tensors)
    weight = layer.get_parameter("weight").detach().double()
    inputs = torch.randn(5, *((36, 6, 6) if weight.dim() == 4 else (36,)))
    operation = partial(nn.functional.conv2d, padding=1) if weight.dim() == 4 else nn.functional.linear
    expected = operation(inputs.double(), weight + delta(record, double, weight))
    cls = getattr(modules, kind)
    with torch.no_grad():
        wrapper = cls.make_module_from_state_dict("layer", layer, *(tensors.get(end) for end in cls.weight_list))
        wrapper.apply_to()
        wrapper.eval()
        found = layer(inputs)
    assert torch.allclose(found.double(), expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(operation(inputs.double(), weight), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_ia3_scales_columns_or_rows(on_input: bool, kernel: tuple[int, ...]) -> None:
    weight = torch.randn(8, 12, *kernel, dtype=torch.float64)
    factor = torch.randn(12 if on_input else 8, dtype=torch.float64)
    record = IA3(weight=Memory().add(factor.numpy()), on_input=on_input)
    axis = "oi...,i->oi..." if on_input else "oi...,o->oi..."
    assert torch.equal(delta(record, double, weight), torch.einsum(axis, weight, factor))


def test_old_glora_is_told_by_its_shapes() -> None:
    _, _, new = made("glora")
    old = {
        "a1.weight": new["a2.weight"],
        "a2.weight": new["a1.weight"],
        "b1.weight": new["b2.weight"],
        "b2.weight": new["b1.weight"],
        "alpha": new["alpha"],
    }
    records = [record_of(tensors) for tensors in (new, old)]
    assert [record.old for record in records if isinstance(record, GLoRA)] == [False, True]
    weight = torch.randn(16, 36, dtype=torch.float64)
    assert torch.allclose(*(delta(record, double, weight) for record in records), rtol=1e-12)


def test_stored_rotations_are_used_as_they_are() -> None:
    turns, _ = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64))
    weight = torch.randn(8, 12, dtype=torch.float64)
    record = OFT(blocks=Memory().add(turns.numpy()), rotations=True)
    expected = torch.cat([turns[0].T @ weight[:4], turns[1].T @ weight[4:]])
    assert torch.allclose(weight + delta(record, double, weight), expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_dora_over_columns_gives_each_column_its_length(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    weight = torch.randn(8, 12, *kernel, dtype=torch.float64)
    ones = (1,) * len(kernel)
    lengths = torch.rand(1, 12, *ones, dtype=torch.float64) + 0.5
    record = record_of(
        {
            "lora_up.weight": torch.randn(8, 2, *ones),
            "lora_down.weight": torch.randn(2, 12, *kernel),
            "dora_scale": lengths,
        }
    )
    merged = weight + delta(record, double, weight)
    norms = merged.transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(norms, lengths.flatten(), rtol=1e-12)


@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 8])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rotated_columns_are_those_of_peft(terms: int | None) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    weight = model[0].weight.detach().double().clone()
    series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    config = peft.OFTConfig(oft_block_size=4, r=0, target_modules=["0"], init_weights=True, **series)
    wrapped = peft.get_peft_model(model, config)
    vectors = next(p for name, p in wrapped.named_parameters() if "oft_R" in name)
    vectors.data.copy_(torch.randn_like(vectors) * 0.1)
    record = InputOFT(vectors=Memory().add(vectors.detach().numpy()), terms=terms)
    merged = wrapped.merge_and_unload()[0].weight.detach().double()
    assert torch.allclose(weight + delta(record, double, weight), merged, rtol=1e-5, atol=1e-6)


CONVERTIBLE = [name for name in CASES if not name.startswith(("glora", "full", "oft", "boft"))]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_as_lora_makes_the_same_change(name: str) -> None:
    _, layer, tensors = made(name)
    record = record_of({key: tensor.double() for key, tensor in tensors.items()})
    weight = layer.get_parameter("weight").detach().double()
    kernel = (3, 3) if weight.dim() == 4 else None
    made_lora = as_lora("module", record, kernel)
    assert isinstance(made_lora, LoRA)
    assert made_lora.mid is None
    found, expected = (delta(one, double, weight) for one in (made_lora, record))
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_kronecker_product_with_a_core_of_any_rank_becomes_lora(rank: int) -> None:
    torch.manual_seed(rank)
    shapes = {"w1": (4, 6), "t2": (rank, rank, 3, 3), "w2_a": (rank, 4), "w2_b": (rank, 6)}
    record = record_of({f"lokr_{name}": torch.randn(shape).double() for name, shape in shapes.items()})
    found, expected = (delta(one, double).flatten(1) for one in (as_lora("module", record, (3, 3)), record))
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_as_full_makes_the_same_change(name: str) -> None:
    _, layer, tensors = made(name)
    record = record_of({key: tensor.double() for key, tensor in tensors.items()})
    weight = layer.get_parameter("weight").detach().double()
    base = Memory().add(weight.numpy())
    full = as_full("module", record, base, None)
    expected = delta(record, double, weight)
    assert (delta(full, double, weight) - expected).norm() <= 1e-12 * expected.norm()
    if needs_weight(record):
        with pytest.raises(CannotHold, match="give --base MODEL"):
            as_full("module", record, None, None)


@pytest.mark.parametrize("name", ["glora", "oft", "full"])
def test_what_is_no_product_of_factors_is_no_lora(name: str) -> None:
    record = record_of(made(name)[2])
    with pytest.raises(CannotHold, match=f"is {record.algorithm}, which is no LoRA.*--as full"):
        as_lora("module", record)


def test_rows_of_a_fused_record_are_rows_of_its_change() -> None:
    record = record_of(made("lokr-whole")[2])
    whole = delta(record, double)
    part = Rows(of=record, ranges=((5, 8), (1, 2)))
    assert torch.equal(delta(part, double), torch.cat([whole[5:8], whole[1:2]]))
    assert torch.allclose(delta(as_lora("module", part), double), delta(part, double), rtol=1e-6, atol=1e-7)


def test_another_size_than_the_weights_is_an_error() -> None:
    record = record_of(made("lora")[2])
    with pytest.raises(MismatchError, match=r"has the shape \[16, 36\] \(expected \[16, 37\]"):
        delta(record, double, torch.zeros(16, 37))


def test_zero_rows_have_no_length_to_be_given() -> None:
    record = record_of({"lora_up.weight": torch.zeros(8, 2), "lora_down.weight": torch.zeros(2, 12)})
    lengths = Memory().add(np.ones((8, 1), np.float32))
    dora = record_of(
        {
            "lora_up.weight": torch.zeros(8, 2),
            "lora_down.weight": torch.zeros(2, 12),
            "dora_scale": value(lengths),
        }
    )
    assert not delta(record, double, torch.zeros(8, 12)).any()
    assert not delta(dora, double, torch.zeros(8, 12)).any()

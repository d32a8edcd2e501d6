"""From any layout to any other that can hold it, and back: the vectors are the same, bit by bit."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdformats.adapters.errors import CannotHold
from sdformats.embeddings import LAYOUTS, open_embedding
from sdformats.files import open_source
from sdformats.views import bits
from sdmerge import convert
from tests.sdmerge.embedding import samples

if TYPE_CHECKING:
    from pathlib import Path

    from sdformats.embeddings.layout import EmbeddingLayout

ENDINGS = {"safetensors": ".safetensors", "torch": ".pt", "png": ".png", "folder": ""}
WRITTEN = [(layout, container) for layout in LAYOUTS for container in layout.containers]
NUMBER = itertools.count()
Known = dict[tuple[str | None, str], tuple[str, tuple[int, ...], bytes]]


def known(path: Path) -> Known:
    """Return what there is for each word and encoder."""
    with open_source(path) as source:
        embedding, _ = open_embedding(source)
        return {
            (word.token, name): (str(ref.spec.dtype), ref.shape, bits(ref).tobytes())
            for word in embedding.words
            for name, ref in (*word.vectors.items(), *((f"{n}_out", r) for n, r in word.outputs.items()))
        }


def without_tokens(found: Known) -> list[object]:
    return sorted((name, value) for (_, name), value in found.items())


def target(folder: Path, layout: EmbeddingLayout, container: str) -> Path:
    suffix = ".bin" if (layout.name, container) == ("diffusers", "torch") else ENDINGS[container]
    return folder / f"{next(NUMBER)}-{layout.name}{suffix}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_there_and_back(tmp_path: Path, data: st.DataObject) -> None:
    first, first_container = data.draw(st.sampled_from(WRITTEN), "first layout")
    sample = first.name if first_container != "png" else "png"
    encoders = data.draw(st.sampled_from([*samples.ENCODERS.get(sample, ("clip_l",)), "clip_l"]), "encoders")
    if frozenset(encoders.split()) not in first.encoders or sample not in samples.ENCODERS:
        return
    count = 1 if first.name == "pivotal" else data.draw(st.integers(1, 5), "vectors")
    dtypes = [torch.float32] if first_container == "png" else [torch.float16, torch.bfloat16, torch.float32]
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    token = data.draw(st.sampled_from(["<cat>", "<my old cat>", "<c.a.t>"]), "token")
    folder = tmp_path / str(next(NUMBER))
    start = samples.put(sample, folder, samples.vectors(encoders, count, dtype, count), token)
    before = known(start)
    second, second_container = data.draw(st.sampled_from(WRITTEN), "second layout")
    there, back = target(folder, second, second_container), target(folder, first, first_container)
    try:
        convert(start, there, to=second.name)
    except CannotHold:
        assert frozenset(encoders.split()) not in second.encoders or (second.name == "pivotal" and count > 1)
        return
    between = known(there)
    if second_container == "png":
        assert all(value[0] == "F32" for value in between.values())
    else:
        assert without_tokens(between) == without_tokens(before)
    if first.names and second.names:
        assert between == before
    convert(there, back, to=first.name, dtype="keep" if second_container != "png" else NAMES[dtype])
    assert without_tokens(known(back)) == without_tokens(before)


NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def test_every_pair_of_layouts_that_can_hold_it(tmp_path: Path) -> None:
    """Without chance: one SD1 and one SDXL embedding through everything."""
    for encoders in ("clip_l", "clip_l clip_g"):
        given_ = samples.vectors(encoders, 1)
        start = samples.put("bundle", tmp_path / encoders.replace(" ", ""), given_)
        through = []
        for layout, container in WRITTEN:
            if frozenset(encoders.split()) not in layout.encoders:
                continue
            there = target(tmp_path, layout, container)
            convert(start, there, to=layout.name)
            assert without_tokens(known(there)) == without_tokens(known(start)), layout.name
            through.append(there)
        assert len(through) >= 6
        for one, (layout, container) in itertools.product(through, WRITTEN):
            if frozenset(encoders.split()) in layout.encoders:
                there = target(tmp_path, layout, container)
                convert(one, there, to=layout.name)
                assert without_tokens(known(there)) == without_tokens(known(start)), (one.name, layout.name)

"""Aesthetic embeddings, null-text inversions and CLIP inversions, in any layout and back; torch and safetensors read them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdmerge
from sdformats import aesthetic, clip_inversion, null_text
from sdformats.errors import CorruptFile, FormatError, UnsafeFile
from sdformats.files import open_source
from sdmerge.errors import RequestError
from tests.formats import hostile_pickles as hostile
from tests.formats.pickle_oracle import same

if TYPE_CHECKING:
    from collections.abc import Mapping

REAL = Path("/work/shared/real")
TYPES = [torch.float16, torch.bfloat16, torch.float32]


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def texts(path: Path) -> Mapping[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


class TestAesthetic:
    @settings(max_examples=40)
    @given(st.sampled_from([768, 1024, 1280]), st.booleans(), st.sampled_from(TYPES), st.integers(0, 2**32))
    def test_there_and_back(
        self, tmp_path_factory: pytest.TempPathFactory, width: int, flat: bool, dtype: torch.dtype, seed: int
    ) -> None:
        folder = tmp_path_factory.getbasetemp()
        vector = random_tensor((width,) if flat else (1, width), dtype, seed)
        first = saved(folder / "a.pt", vector)
        sdmerge.convert(first, folder / "a.safetensors", kind="aesthetic", overwrite=True)
        assert same(load_file(folder / "a.safetensors"), {"aesthetic_embedding": vector})
        sdmerge.convert(folder / "a.safetensors", folder / "b.pt", overwrite=True)
        assert same(torch.load(folder / "b.pt", weights_only=True), vector)

    def test_a_bare_vector_is_not_guessed(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.pt", torch.ones(1, 768))
        with pytest.raises(RequestError, match=r"could be .*textual.* or an aesthetic .*--as embedding.aesthetic"):
            sdmerge.convert(path, tmp_path / "b.safetensors")
        found = sdmerge.inspect_path(path, kind="aesthetic")
        assert (found["kind"], found["family"], found["layout"]) == ("aesthetic", "sd1", "bare")

    def test_the_named_form_is_certain(self, tmp_path: Path) -> None:
        save_file({"aesthetic_embedding": torch.ones(768)}, str(tmp_path / "a.safetensors"))
        found = sdmerge.inspect_path(tmp_path / "a.safetensors")
        assert (found["kind"], found["readings"]) == ("aesthetic", ["aesthetic"])

    @pytest.mark.parametrize("shape", [(768,), (1, 768)])
    def test_it_seeds_a_clip_inversion_and_comes_back(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        vector = random_tensor(shape, torch.float16)
        path = saved(tmp_path / "a.pt", vector)
        sdmerge.convert(path, tmp_path / "c.safetensors", to="clip-inversion", kind="aesthetic")
        assert same(load_file(tmp_path / "c.safetensors"), {"clip_image": vector.reshape(1, 768)})
        sdmerge.convert(tmp_path / "c.safetensors", tmp_path / "b.safetensors", to="aesthetic")
        assert same(load_file(tmp_path / "b.safetensors"), {"aesthetic_embedding": vector.reshape(1, 768)})

    @pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
    @pytest.mark.parametrize("name", ["097_aivazovsky.pt", "099_laion_7plus.pt"])
    def test_published_ones(self, tmp_path: Path, name: str) -> None:
        sdmerge.convert(REAL / name, tmp_path / "a.safetensors", kind="aesthetic")
        sdmerge.convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
        before, after = (torch.load(path, "cpu", weights_only=True) for path in (REAL / name, tmp_path / "b.pt"))
        assert same(after, before.detach())
        with open_source(REAL / name) as source:
            assert aesthetic.describe(source) == {"width": 768}


class TestNullText:
    FORMS = ("named", "bare", "list")

    def value(self, form: str, steps: int, dtype: torch.dtype, *, flat: bool) -> Any:
        shape = (steps, 77, 6) if flat else (steps, 1, 77, 6)
        whole = random_tensor(shape, dtype)
        if form == "named":
            return {"null_text": whole.reshape(steps, 1, 77, 6)}
        return whole if form == "bare" else list(whole)

    @pytest.mark.parametrize(("first", "second"), [*product(FORMS, FORMS)])
    @pytest.mark.parametrize("flat", [True, False])
    @pytest.mark.parametrize("ending", ["pt", "safetensors"])
    def test_there_and_back(self, tmp_path: Path, first: str, second: str, flat: bool, ending: str) -> None:
        value = self.value(first, 5, torch.float16, flat=flat)
        path = saved(tmp_path / "a.pt", value)
        sdmerge.convert(path, tmp_path / f"b.{ending}", to=second)
        sdmerge.convert(tmp_path / f"b.{ending}", tmp_path / "c.pt", to=first)
        again = torch.load(tmp_path / "c.pt", weights_only=True)
        assert same(again, self.value(first, 5, torch.float16, flat=False))

    def test_what_the_community_saves_becomes_one_file_with_a_name(self, tmp_path: Path) -> None:
        steps = [torch.randn(1, 77, 768) for _ in range(50)]
        path = saved(tmp_path / "uncond.pt", steps)
        found = sdmerge.inspect_path(path)
        assert (found["kind"], found["family"], found["layout"]) == ("null-text", "sd1", "list")
        sdmerge.convert(path, tmp_path / "n.safetensors")
        assert same(load_file(tmp_path / "n.safetensors"), {"null_text": torch.stack(steps)})
        with open_source(tmp_path / "n.safetensors") as source:
            assert null_text.describe(source) == {"steps": 50, "width": 768, "noise": False}

    def test_the_noise_and_the_prompt_are_kept_or_their_loss_is_told(self, tmp_path: Path) -> None:
        tensors = {"null_text": torch.randn(5, 1, 77, 6), "x_T": torch.randn(1, 4, 8, 8)}
        said = {"prompt": "a cat", "scheduler": "ddim", "guidance": "7.5"}
        save_file(tensors, str(tmp_path / "n.safetensors"), said)
        with open_source(tmp_path / "n.safetensors") as source:
            assert null_text.describe(source) == {"steps": 5, "width": 6, "noise": True, **said}
        sdmerge.convert(tmp_path / "n.safetensors", tmp_path / "n.pt")
        loaded = torch.load(tmp_path / "n.pt", weights_only=True)
        assert same({key: loaded[key] for key in (*tensors, *said)}, {**tensors, **said})
        sdmerge.convert(tmp_path / "n.pt", tmp_path / "again.safetensors")
        assert same(load_file(tmp_path / "again.safetensors"), tensors)
        assert {key: texts(tmp_path / "again.safetensors")[key] for key in said} == said
        with pytest.raises(FormatError, match="no place for the noise x_T"):
            sdmerge.convert(tmp_path / "n.safetensors", tmp_path / "l.pt", to="list")
        del tensors["x_T"]
        save_file(tensors, str(tmp_path / "m.safetensors"), said)
        report = sdmerge.convert(tmp_path / "m.safetensors", tmp_path / "l.pt", to="list")
        (note,) = [
            note for note in report.notes if note.startswith("left out, as the layout list has no place for texts")
        ]
        assert sorted(note.partition("texts: ")[2].split(", ")) == sorted(said)

    def test_lists_with_steps_that_differ(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.pt", [torch.ones(1, 77, 6), torch.ones(1, 77, 6).half()])
        with pytest.raises(CorruptFile, match=r"'1': is F16 \[1, 77, 6\] .expected F32"):
            sdmerge.convert(path, tmp_path / "b.safetensors")
        path = saved(tmp_path / "b.pt", {"0": torch.ones(1, 77, 6), "2": torch.ones(1, 77, 6)})
        with pytest.raises(CorruptFile, match="'1': is missing"):
            sdmerge.convert(path, tmp_path / "b.safetensors")


class TestClipInversion:
    def test_there_and_back_with_its_texts(self, tmp_path: Path) -> None:
        tensors, said = {"clip_image": torch.randn(3, 768)}, {"model": "variations"}
        save_file(tensors, str(tmp_path / "c.safetensors"), said)
        with open_source(tmp_path / "c.safetensors") as source:
            assert clip_inversion.describe(source) == {"vectors": 3, "width": 768}
        sdmerge.convert(tmp_path / "c.safetensors", tmp_path / "c.pt")
        assert same(torch.load(tmp_path / "c.pt", weights_only=True), {**tensors, **said})
        sdmerge.convert(tmp_path / "c.pt", tmp_path / "d.safetensors")
        assert same(load_file(tmp_path / "d.safetensors"), tensors)
        with pytest.raises(FormatError, match="an aesthetic embedding is one vector, and there are 3"):
            sdmerge.convert(tmp_path / "c.pt", tmp_path / "e.pt", to="aesthetic")


@pytest.mark.parametrize("trick", ["os.system", "posix.system", "builtins.exec", "subprocess.Popen"])
@pytest.mark.parametrize("form", ["bare", "list", "named"])
def test_hostile_ones_are_refused_by_what_they_would_run(tmp_path: Path, trick: str, form: str) -> None:
    module, _, name = trick.rpartition(".")
    call = hostile.call(hostile.name(module, name), f"touch {tmp_path / 'ran'}")
    value: Any = {
        "bare": call,
        "list": [hostile.tensor(), call],
        "named": {"clip_image": hostile.tensor(), "note": call},
    }
    path = hostile.write_zip(tmp_path / "x.pt", value[form])
    with pytest.raises(UnsafeFile, match=trick):
        sdmerge.convert(path, tmp_path / "o.safetensors", kind="aesthetic")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "o.safetensors").exists()

"""Hypernetworks as A1111 and NovelAI write them, built and saved by torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdformats.errors import CorruptFile, FormatError, UnsafeFile, UnsupportedFile
from sdformats.files import open_source
from sdformats.hypernetwork import (
    Activation,
    Dropout,
    Hypernetwork,
    Linear,
    Norm,
    Settings,
    describe,
    read_hypernetwork,
    write_a1111,
    write_novelai,
)
from sdformats.layout import detect
from tests.formats import hostile_pickles as hostile
from tests.formats.hypernetworks import FULL, a1111, networks, novelai

if TYPE_CHECKING:
    from pathlib import Path


def read(path: Path) -> Hypernetwork:
    with open_source(path) as source:
        assert detect(source.specs, metadata=source.metadata).kind == "hypernetwork"
        return read_hypernetwork(source)


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


class TestReading:
    def test_every_slot_in_its_place(self, tmp_path: Path) -> None:
        record = read(saved(tmp_path / "h.pt", a1111(FULL, (8, 16))))
        assert list(record.networks) == [8, 16]
        for width, pair in record.networks.items():
            for network in pair:
                kinds = [type(slot) for slot in network]
                assert kinds == [Linear, Activation, Norm, Dropout, Linear, Activation, Norm, Dropout, Linear, Norm]
                assert [slot.share for slot in network if isinstance(slot, Dropout)] == [0.1, 0.2]
                assert [slot.weight.shape for slot in network if isinstance(slot, Linear)] == [
                    (width * 2, width), (width, width * 2), (width, width)
                ]  # fmt: skip
        assert record.bends == "the activation swish and layer norms"
        assert record.settings.name == "style"
        assert record.settings.step == 1200

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    @pytest.mark.parametrize("activate_output", [True, False])
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("activation", [None, "linear", "relu", "leakyrelu", "softsign"])
    def test_every_combination(
        self, tmp_path: Path, width: int, activate_output: bool, norm: bool, activation: str | None
    ) -> None:
        structure = [1, *[2] * (width - 1), 1]
        chosen = {"layer_structure": structure, "activation_func": activation, "is_layer_norm": norm}
        chosen |= {"activate_output": activate_output, "dropout_structure": [0, *[0.25] * (width - 1), 0]}
        value = a1111(chosen, (6,))
        record = read(saved(tmp_path / "h.pt", value))
        linears = [slot for slot in record.networks[6][1] if isinstance(slot, Linear)]
        assert [slot.weight.shape[0] for slot in linears] == [6 * size for size in structure[1:]]
        bends = activation not in (None, "linear") and (activate_output or width > 1)
        assert (record.bends is None) == (not bends and not norm)

    def test_missing_settings_have_their_old_meaning(self, tmp_path: Path) -> None:
        plain = {key: value for key, value in a1111({}, (6,)).items() if isinstance(key, int)}
        record = read(saved(tmp_path / "h.pt", plain))
        assert record.settings == Settings()
        chosen = record.settings
        assert (chosen.layer_structure, chosen.activation, chosen.activate_output) == ((1, 2, 1), None, True)
        assert (chosen.is_layer_norm, chosen.last_layer_dropout, chosen.weight_initialization) == (
            False,
            False,
            "Normal",
        )

    @pytest.mark.parametrize(("last", "expected"), [(False, (0, 0.3, 0, 0)), (True, (0, 0.3, 0.3, 0))])
    def test_old_files_only_say_whether_there_is_dropout(
        self, tmp_path: Path, last: bool, expected: tuple[float, ...]
    ) -> None:
        chosen = {"layer_structure": [1, 2, 2, 1], "use_dropout": True, "last_layer_dropout": last}
        value = a1111(chosen | {"dropout_structure": list(expected)}, (6,))
        del value["dropout_structure"]
        assert read(saved(tmp_path / "h.pt", value)).settings.dropouts == expected

    def test_novelai(self, tmp_path: Path) -> None:
        record = read(saved(tmp_path / "h.pt", novelai((6, 8))))
        assert record.settings == Settings()
        assert [type(slot) for slot in record.networks[8][0]] == [Linear, Linear]
        assert record.bends is None

    def test_lists_for_tuples_half_precision_and_odd_multiples(self, tmp_path: Path) -> None:
        value = a1111({"layer_structure": [1, 1.5, 0.5, 1]}, (8,))
        value[8] = [{name: tensor.half() for name, tensor in side.items()} for side in value[8]]
        record = read(saved(tmp_path / "h.pt", value))
        assert [slot.weight.shape[0] for slot in record.networks[8][0] if isinstance(slot, Linear)] == [12, 4, 8]

    def test_the_family_is_told_by_the_context(self, tmp_path: Path) -> None:
        for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (320, None)):
            source = open_source(saved(tmp_path / "h.pt", novelai((width, 8))))
            assert detect(source.specs).family == family
            source.close()

    def test_what_inspect_says(self, tmp_path: Path) -> None:
        with open_source(saved(tmp_path / "h.pt", a1111(FULL, (8,)))) as source:
            found = describe(source)
        assert json.loads(json.dumps(found)) == {
            "widths": [8], "layers": [1, 2, 1, 1], "activation": "swish", "activate_output": False, "layer_norm": True,
            "dropout": [0, 0.1, 0.2, 0], "linear": False, "name": "style", "step": 1200, "trained_on": "model.ckpt",
        }  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                {"layer_structure": [1, 2, 2, 1]},
                "'6.0.linear.1.weight': is F32 [6, 12] (expected [12, 12], as its settings say",
            ),
            ({"layer_structure": [2, 2, 1]}, "'layer_structure': is [2, 2, 1]"),
            ({"layer_structure": [1]}, "'layer_structure': is [1]"),
            ({"layer_structure": "x"}, "'layer_structure': is 'x' (expected a list of numbers)"),
            ({"layer_structure": [1, "2", 1]}, "(expected a list of numbers)"),
            ({"layer_structure": [1, float("nan"), 1]}, "'layer_structure': is [1, nan, 1]"),
            ({"layer_structure": [1, 10**9, 1]}, "'layer_structure': is [1, 1000000000, 1]"),
            ({"activation_func": "relu"}, "'6.0.linear.2.weight': is missing (expected [6, 12], as its settings say"),
            ({"is_layer_norm": True}, "'6.0.linear.1.weight': is F32 [6, 12] (expected [12]"),
            ({"is_layer_norm": 3}, "'is_layer_norm': is '3' (expected true or false)"),
            ({"dropout_structure": [0, 0.5]}, "'dropout_structure': is [0, 0.5] (expected 3 numbers"),
            ({"dropout_structure": [0, 1, 0]}, "'dropout_structure': is [0, 1, 0]"),
            ({"step": "many"}, "'step': is 'many' (expected a whole number)"),
        ],
    )
    def test_settings_that_contradict_the_tensors(self, tmp_path: Path, change: dict[str, Any], says: str) -> None:
        path = saved(tmp_path / "h.pt", a1111({}, (6,)) | change)
        with pytest.raises(CorruptFile) as caught:
            read(path)
        assert says in str(caught.value)

    def test_a_tensor_too_many(self, tmp_path: Path) -> None:
        value = a1111({}, (6,))
        value[6][1]["linear.2.weight"] = torch.zeros(6, 6)
        with pytest.raises(
            CorruptFile, match=r"'6.1.linear.2.weight': has no place .expected none, as its settings say"
        ):
            read(saved(tmp_path / "h.pt", value))

    @pytest.mark.parametrize("name", ["linear.0.alpha", "res.0.weight", "linear3.weight"])
    def test_other_variants_by_name(self, tmp_path: Path, name: str) -> None:
        value = a1111({}, (6,))
        value[6][1][name] = torch.zeros(6, 6)
        with pytest.raises(UnsupportedFile, match=rf"'6.1.{name}': is no part of a hypernetwork that A1111 or NovelAI"):
            read(saved(tmp_path / "h.pt", value))

    @pytest.mark.parametrize("trick", ["os.system", "builtins.eval", "torch.hub.load", "numpy.testing.Tester"])
    def test_hostile_files_by_the_name_of_what_they_would_run(self, tmp_path: Path, trick: str) -> None:
        module, _, name = trick.rpartition(".")
        marker = tmp_path / "ran"
        call = hostile.call(hostile.name(module, name), f"touch {marker}")
        path = hostile.write_zip(tmp_path / "h.pt", {6: ({"linear.0.weight": call}, {}), "step": 1})
        with pytest.raises(UnsafeFile, match=trick), open_source(path):
            pass
        assert not marker.exists()

    def test_a_whole_module_in_place_of_its_weights(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "h.pt", {6: (networks({}, 6), networks({}, 6)), "step": 1})
        with pytest.raises(UnsafeFile, match=r"torch.nn.modules.container.*code and all"), open_source(path):
            pass


class TestWriting:
    def test_novelai_has_no_place_for_more_than_two_layers(self, tmp_path: Path) -> None:
        for chosen in (FULL, {"activation_func": "relu"}, {"layer_structure": [1, 3, 1]}, {"is_layer_norm": True}):
            record = read(saved(tmp_path / "h.pt", a1111(chosen, (6,))))
            with pytest.raises(FormatError, match="two linear layers with nothing between them.*choose --to a1111"):
                write_novelai(record)

    def test_every_setting_is_said(self, tmp_path: Path) -> None:
        """Readers disagree about what a missing activate_output means."""
        written = write_a1111(read(saved(tmp_path / "h.pt", novelai((6,)))))
        assert isinstance(written.tree, dict)
        assert written.tree["activate_output"] is True
        assert written.tree["layer_structure"] == [1, 2, 1]
        assert written.metadata["activation_func"] == "null"
        assert set(written.metadata) == {key for key in written.tree if isinstance(key, str)}

    def test_safetensors_without_settings_means_the_defaults(self, tmp_path: Path) -> None:
        tensors = {f"6.{side}.{name}": tensor for side in (0, 1) for name, tensor in a1111({}, (6,))[6][side].items()}
        save_file(tensors, str(tmp_path / "h.safetensors"))
        assert read(tmp_path / "h.safetensors").settings == Settings()


def test_the_oracle_has_the_slots_of_the_settings() -> None:
    """The networks of these tests are built by torch from the rules alone; count them once by hand."""
    assert [type(part) for part in networks(FULL, 4)["linear"]] == [
        nn.Linear, nn.Hardswish, nn.LayerNorm, nn.Dropout, nn.Linear, nn.Hardswish, nn.LayerNorm, nn.Dropout, nn.Linear,
        nn.LayerNorm,
    ]  # fmt: skip

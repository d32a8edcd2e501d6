"""Which tensors of a file count, what they are called, and what is told of the rest."""

from __future__ import annotations

import collections
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sdformats.errors import CorruptFile
from sdformats.pickle import PickleSource, open_pickle
from tests.formats.pickle_oracle import check, save

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules with the names of Lightning's and omegaconf's, so that pickle writes what those would."""
    made: dict[str, type] = {}
    for full in ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
                 "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
                 "pytorch_lightning.utilities.parsing.AttributeDict",
                 "omegaconf.dictconfig.DictConfig", "omegaconf.base.ContainerMetadata", "omegaconf.nodes.AnyNode"):  # fmt: skip
        module, _, name = full.rpartition(".")
        bases = (dict,) if name == "AttributeDict" else (object,)
        made[name] = type(name, bases, {"__module__": module})
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setattr(sys.modules[module], name, made[name], raising=False)
    result = types.ModuleType("made")
    result.__dict__.update(made)
    return result


def config(made: types.ModuleType) -> Any:
    """Like an omegaconf DictConfig: its children point back at it."""
    top, node, meta = made.DictConfig(), made.AnyNode(), made.ContainerMetadata()
    meta.__dict__.update(ref_type=Any, object_type=dict, resolver_cache=collections.defaultdict(dict))
    node.__dict__.update(_parent=top, _val=3)
    top.__dict__.update(_metadata=meta, _parent=None, _content={"a": node})
    return top


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_lightning_checkpoint(tmp_path: Path, stand_ins: types.ModuleType, zipped: bool, protocol: int) -> None:
    weights = {"model.diffusion_model.a": torch.arange(4.0), "cond_stage_model.b": torch.ones(2, 2).half()}
    moments = {i: {"step": 7, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)} for i in range(3)}
    stopper = stand_ins.EarlyStopping()
    stopper.best_score = torch.tensor(0.5)
    parsed = stand_ins.AttributeDict(lr=1e-4)
    checkpoint = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(weights),
        "callbacks": {stand_ins.ModelCheckpoint: {"monitor": "val/loss", "best": np.float64(0.25)}, "stop": stopper},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4, "params": [0, 1, 2]}]}],
        "lr_schedulers": [{"milestones": collections.Counter([3])}],
        "hyper_parameters": {"config": config(stand_ins), "parsed": parsed},
        "native_amp_scaling_state": None,
    }
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    source = check(save(checkpoint, tmp_path / "x.ckpt", **options), weights)
    assert source.metadata == {
        "epoch": "3",
        "global_step": "470000",
        "pytorch-lightning_version": "1.4.2",
        "lr_schedulers": '[{"milestones": {"3": 1}}]',
        "native_amp_scaling_state": "null",
    }
    assert source.notes == (
        "left out beside 'state_dict': callbacks (1 tensor), optimizer_states (6 tensors), hyper_parameters",
    )


class TestNames:
    def open(self, tmp_path: Path, value: Any) -> PickleSource:
        with open_pickle(save(value, tmp_path / "x.pt")) as source:
            return source

    def test_paths_are_joined_by_dots(self, tmp_path: Path) -> None:
        one = torch.ones(1)
        source = self.open(tmp_path, {"unet": {"w": one}, "list": [one, (one, {"x": one})], b"raw": one, 7: one})
        assert sorted(source.specs) == ["7", "list.0", "list.1.0", "list.1.1.x", "raw", "unet.w"]

    def test_a_hypernetwork(self, tmp_path: Path) -> None:
        pair = ({"linear.0.weight": torch.ones(2, 2)}, {"linear.0.bias": torch.ones(2)})
        source = self.open(
            tmp_path,
            {
                768: pair,
                1280: pair,
                "step": 20,
                "name": "n",
                "layer_structure": [1, 2, 1],
                "is_layer_norm": False,
                "activation": None,
            },
        )
        assert list(source.specs) == ["768.0.linear.0.weight", "1280.0.linear.0.weight",
                                      "768.1.linear.0.bias", "1280.1.linear.0.bias"]  # fmt: skip
        assert source.metadata == {
            "step": "20", "name": "n", "layer_structure": "[1, 2, 1]", "is_layer_norm": "false", "activation": "null",
        }  # fmt: skip
        assert source.notes == ()

    def test_an_embedding(self, tmp_path: Path) -> None:
        source = self.open(
            tmp_path, {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"}
        )
        assert list(source.specs) == ["string_to_param.*"]
        assert source.metadata == {"string_to_token": '{"*": 265}', "name": "x"}

    @pytest.mark.parametrize("values", [{"*": torch.nn.Parameter(torch.ones(2))}, {"*": torch.ones(2)}])
    def test_a_parameter_dict(self, tmp_path: Path, values: Any) -> None:
        source = self.open(tmp_path, {"string_to_param": torch.nn.ParameterDict(values), "n": [torch.ones(1)]})
        assert sorted(source.specs) == ["n.0", "string_to_param.*"]

    @pytest.mark.parametrize("wrapper", ["model", "module", "params", "params_ema"])
    def test_a_lone_wrapper_is_taken_off_and_told(self, tmp_path: Path, wrapper: str) -> None:
        source = self.open(tmp_path, {wrapper: {"a.b": torch.ones(1)}, "epoch": 2, "config": {"deep": 1}})
        assert list(source.specs) == ["a.b"]
        assert source.metadata == {"epoch": "2"}
        assert source.notes == (f"left out beside '{wrapper}': config", f"the tensors are those under '{wrapper}'")

    def test_a_wrapper_beside_other_tensors_stays(self, tmp_path: Path) -> None:
        source = self.open(tmp_path, {"params": {"a": torch.ones(1)}, "params_ema": {"a": torch.ones(1)}})
        assert sorted(source.specs) == ["params.a", "params_ema.a"]

    def test_a_wrapper_around_a_state_dict(self, tmp_path: Path) -> None:
        source = self.open(tmp_path, {"model": {"state_dict": {"a": torch.ones(1)}, "opt": torch.ones(2)}})
        assert list(source.specs) == ["a"]
        assert source.notes == ("left out beside 'model.state_dict': opt (1 tensor)",
                                "the tensors are those under 'model.state_dict'")  # fmt: skip

    def test_a_bare_tensor_has_the_empty_name(self, tmp_path: Path) -> None:
        assert list(self.open(tmp_path, torch.ones(1, 768)).specs) == [""]

    @pytest.mark.parametrize("value", [{}, [], {"step": 3}, None])
    def test_no_tensors_is_a_file_too(self, tmp_path: Path, value: Any) -> None:
        source = self.open(tmp_path, value)
        assert source.specs == {}
        assert source.notes[-1] == "holds no tensors"

    def test_two_that_collide(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptFile, match="two tensors named 'a.b'"):
            self.open(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})

    def test_what_is_no_tensor_is_told(self, tmp_path: Path) -> None:
        source = self.open(tmp_path, {"a": {"t": torch.ones(1), "n": 3, "s": "x"}, "many": list(range(300))})
        assert source.notes == (
            "left out, as they are no tensors: a.n, a.s, many.0, many.1, many.2, many.3, many.4, many.5 and 294 more",
        )

    def test_large_plain_lists_are_no_metadata(self, tmp_path: Path) -> None:
        values = {"log": list(range(300)), "text": "x" * 2_000_000, "few": [1.5, "x"]}
        source = self.open(tmp_path, {"state_dict": {"t": torch.ones(1)}} | values)
        assert source.metadata == {"few": '[1.5, "x"]'}
        assert source.notes == ("left out beside 'state_dict': log, text",)

"""A LoRA training step against PEFT's on the tiny model: time and bytes; and an estimate of SDXL's memory. See README.md."""

from __future__ import annotations

import re
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from benchmarks import concept, train_cases
from benchmarks.live import Live
from benchmarks.report import save
from sdmerge.train.batches import Batch
from sdmerge.train.inject import layers
from sdmerge.train.loading import load
from sdmerge.train.lora import TARGETS, Lora
from sdmerge.train.losses import schedule_of
from sdmerge.train.networks import Condition, Networks
from sdmerge.train.objective import Objective
from sdmerge.train.settings import DataSettings, LossSettings, ModelSettings, OutputSettings, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

_RANK = 4
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_BESIDE = 2 * (123_060_480 + 694_659_840) + 4 * 83_653_863
"""Bytes of SDXL's text encoders in bf16 and its autoencoder in fp32, which may stay on the device."""


@dataclass
class Side:
    """A model with a LoRA, and one step of its training."""

    networks: Networks
    parameters: Sequence[torch.nn.Parameter]

    def __post_init__(self) -> None:
        self.networks.unet.train()
        self.objective = Objective(self.networks, schedule_of(self.networks.scheduler, LossSettings(), "auto"))
        self.batch = concept.questions(self.networks, concept.diamonds(8, seed=1), draws=1)[0]
        self.told = self.objective.condition(self.batch.captions)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        """Take one."""
        self.objective.denoising(self.batch, self.told).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def most(self) -> int:
        """Return how many bytes of tensors are alive at most during a step, the model's included."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        with Live([*self.networks.unet.parameters(), *self.parameters, *states]) as live:
            self.step()
        return live.most


def ours() -> Side:
    """Return a LoRA of this package."""
    model = ModelSettings(**train_cases.BASE)
    networks = load(model)
    settings = Settings(model=model, data=DataSettings(data=""), output=OutputSettings(output=""))
    return Side(networks, list(Lora(rank=_RANK).attach(networks, settings).parameters.values()))


def peft_side() -> Side:
    """Return a LoRA of PEFT, on the same layers."""
    import peft

    networks = load(ModelSettings(**train_cases.BASE))
    pattern = TARGETS["transformer"]
    names = [path for path, _ in layers(networks.unet) if re.fullmatch(pattern, f"unet.{path}")]
    config = peft.LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=names)
    networks.unet = peft.get_peft_model(networks.unet, config)
    return Side(networks, [one for one in networks.unet.parameters() if one.requires_grad])


@click.command()
@click.option("--rounds", default=60, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(rounds: int, json_path: Path | None) -> None:
    """Measure, count, estimate, print."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sides = {"sdmerge": ours(), "peft": peft_side()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 else reversed(sides):
            started = time.perf_counter()
            sides[name].step()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found[5:]) for name, found in times.items()}
    most = {name: side.most() for name, side in sides.items()}
    found = {
        "step seconds, median": medians,
        "time against peft": medians["sdmerge"] / medians["peft"],
        "live bytes": most,
        "bytes against peft": most["sdmerge"] / most["peft"],
        "SDXL LoRA rank 16, 1024x1024, batch 1, bf16 (estimates)": {
            "checkpointing": sdxl(checkpointing=True),
            "without": sdxl(checkpointing=False),
        },
    }
    Console().print(found)
    save(found, json_path)


def sdxl(*, checkpointing: bool) -> dict[str, float]:
    """Estimate the memory of a step in GB: counted over tensors that hold nothing."""
    import diffusers
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        unet = diffusers.UNet2DConditionModel(**_SDXL)
        torch.set_default_dtype(torch.float32)
        networks = Networks("sdxl", unet, None, (), {})
        unet.requires_grad_(False)
        settings = Settings(model=ModelSettings(model=""), data=DataSettings(data=""), output=OutputSettings(output=""))
        parameters = list(Lora(rank=16).attach(networks, settings).parameters.values())
        networks.train(checkpointing=checkpointing)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        objective = Objective(networks, schedule_of({}, LossSettings(), "epsilon"))
        latents, noise, sizes = torch.randn(1, 4, 128, 128), torch.randn(1, 4, 128, 128), torch.randn(1, 6)
        batch = Batch(latents, ("",), noise, torch.tensor([5]), sizes)
        told = Condition(torch.randn(1, 77, 2048, dtype=torch.bfloat16), torch.randn(1, 1280, dtype=torch.bfloat16))
        with Live([*unet.parameters(), *parameters]) as live:
            weights = live.now
            for _ in range(2):  # the second step has the optimizer's state beside it
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective.denoising(batch, told)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return {
        "weights": round(weights / 1e9, 2),
        "most": round(live.most / 1e9, 2),
        "most, text encoders and autoencoder beside": round((live.most + _BESIDE) / 1e9, 2),
    }


if __name__ == "__main__":
    main()

"""Names and shapes of full-size checkpoints, from the few numbers that define each architecture.

The names are those of the published single-file checkpoints (the latent-diffusion spelling).
Each family carries the parameter counts of its parts, and `Family.specs` refuses to return anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdformats.tensor import DType, Spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _affine(name: str, *shape: int) -> Shapes:
    """Name a weight of `shape` and a bias over its first dimension."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


@dataclass(frozen=True, slots=True)
class UNet:
    """A diffusion UNet of the latent-diffusion design, two residual blocks a level.

    Args:
        channels: width of the first level.
        multipliers: width of each level, as a multiple of `channels`.
        depths: transformer blocks behind each residual block of a level (0: no attention there).
        middle_depth: transformer blocks in the middle.
        context: width of the text encoding.
        added: width of the pooled text and size vector, if the model takes one.
        linear: whether attention is entered through a linear layer instead of a 1x1 convolution.
    """

    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    added: int | None = None
    linear: bool = False

    @property
    def embedding(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels

    def shapes(self) -> Shapes:
        """All parameters, named without the ``model.diffusion_model.`` prefix."""
        yield from _affine("time_embed.0", self.embedding, self.channels)
        yield from _affine("time_embed.2", self.embedding, self.embedding)
        if self.added is not None:
            yield from _affine("label_emb.0.0", self.embedding, self.added)
            yield from _affine("label_emb.0.2", self.embedding, self.embedding)
        yield from _affine("input_blocks.0.0", self.channels, 4, 3, 3)
        skips = [self.channels]
        yield from self._down(skips)
        width = skips[-1]
        yield from self._residual("middle_block.0", width, width)
        yield from self._attention("middle_block.1", width, self.middle_depth)
        yield from self._residual("middle_block.2", width, width)
        yield from self._up(skips)
        yield from _affine("out.0", self.channels)
        yield from _affine("out.2", 4, self.channels, 3, 3)

    def _down(self, skips: list[int]) -> Shapes:
        for level, (multiplier, depth) in enumerate(zip(self.multipliers, self.depths, strict=True)):
            for _ in range(2):
                block, width = f"input_blocks.{len(skips)}", multiplier * self.channels
                yield from self._residual(f"{block}.0", skips[-1], width)
                yield from self._attention(f"{block}.1", width, depth)
                skips.append(width)
            if level + 1 < len(self.multipliers):
                yield from _affine(f"input_blocks.{len(skips)}.0.op", skips[-1], skips[-1], 3, 3)
                skips.append(skips[-1])

    def _up(self, skips: list[int]) -> Shapes:
        index, width = 0, skips[-1]
        for level in reversed(range(len(self.multipliers))):
            for last in (False, False, True):
                block, before = f"output_blocks.{index}", width + skips.pop()
                width = self.multipliers[level] * self.channels
                yield from self._residual(f"{block}.0", before, width)
                yield from self._attention(f"{block}.1", width, self.depths[level])
                if last and level > 0:
                    place = 2 if self.depths[level] else 1
                    yield from _affine(f"{block}.{place}.conv", width, width, 3, 3)
                index += 1

    def _residual(self, name: str, before: int, after: int) -> Shapes:
        yield from _affine(f"{name}.in_layers.0", before)
        yield from _affine(f"{name}.in_layers.2", after, before, 3, 3)
        yield from _affine(f"{name}.emb_layers.1", after, self.embedding)
        yield from _affine(f"{name}.out_layers.0", after)
        yield from _affine(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            yield from _affine(f"{name}.skip_connection", after, before, 1, 1)

    def _attention(self, name: str, width: int, depth: int) -> Shapes:
        if depth == 0:
            return
        projection = (width, width) if self.linear else (width, width, 1, 1)
        yield from _affine(f"{name}.norm", width)
        yield from _affine(f"{name}.proj_in", *projection)
        yield from _affine(f"{name}.proj_out", *projection)
        for index in range(depth):
            block = f"{name}.transformer_blocks.{index}"
            for attention, source in (("attn1", width), ("attn2", self.context)):
                yield f"{block}.{attention}.to_q.weight", (width, width)
                yield f"{block}.{attention}.to_k.weight", (width, source)
                yield f"{block}.{attention}.to_v.weight", (width, source)
                yield from _affine(f"{block}.{attention}.to_out.0", width, width)
            yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
            yield from _affine(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                yield from _affine(f"{block}.{norm}", width)


@dataclass(frozen=True, slots=True)
class Vae:
    """The KL autoencoder: two residual blocks a level going down, three going up, four latent channels."""

    channels: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)

    def shapes(self) -> Shapes:
        """All parameters, named without the ``first_stage_model.`` prefix."""
        widths = [multiplier * self.channels for multiplier in self.multipliers]
        yield from self._encoder(widths)
        yield from self._decoder(widths)
        yield from _affine("quant_conv", 8, 8, 1, 1)
        yield from _affine("post_quant_conv", 4, 4, 1, 1)

    def _encoder(self, widths: list[int]) -> Shapes:
        yield from _affine("encoder.conv_in", self.channels, 3, 3, 3)
        before = self.channels
        for level, width in enumerate(widths):
            for index in range(2):
                yield from self._residual(f"encoder.down.{level}.block.{index}", before, width)
                before = width
            if level + 1 < len(widths):
                yield from _affine(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
        yield from self._middle("encoder", widths[-1])
        yield from _affine("encoder.norm_out", widths[-1])
        yield from _affine("encoder.conv_out", 8, widths[-1], 3, 3)

    def _decoder(self, widths: list[int]) -> Shapes:
        yield from _affine("decoder.conv_in", widths[-1], 4, 3, 3)
        yield from self._middle("decoder", widths[-1])
        before = widths[-1]
        for level in reversed(range(len(widths))):
            for index in range(3):
                yield from self._residual(f"decoder.up.{level}.block.{index}", before, widths[level])
                before = widths[level]
            if level > 0:
                yield from _affine(f"decoder.up.{level}.upsample.conv", before, before, 3, 3)
        yield from _affine("decoder.norm_out", widths[0])
        yield from _affine("decoder.conv_out", 3, widths[0], 3, 3)

    def _middle(self, side: str, width: int) -> Shapes:
        yield from self._residual(f"{side}.mid.block_1", width, width)
        yield from _affine(f"{side}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            yield from _affine(f"{side}.mid.attn_1.{name}", width, width, 1, 1)
        yield from self._residual(f"{side}.mid.block_2", width, width)

    @staticmethod
    def _residual(name: str, before: int, after: int) -> Shapes:
        yield from _affine(f"{name}.norm1", before)
        yield from _affine(f"{name}.conv1", after, before, 3, 3)
        yield from _affine(f"{name}.norm2", after)
        yield from _affine(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            yield from _affine(f"{name}.nin_shortcut", after, before, 1, 1)


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A CLIP text encoder with 77 positions, in the spelling of transformers or of OpenCLIP."""

    width: int
    layers: int
    open_clip: bool = False
    vocabulary: int = 49408

    def shapes(self) -> Shapes:
        """All parameters and, in the spelling of transformers, ``position_ids``."""
        yield from self._open_clip() if self.open_clip else self._transformers()

    def _transformers(self) -> Shapes:
        stem, width = "transformer.text_model", self.width
        yield f"{stem}.embeddings.position_ids", (1, 77)
        yield f"{stem}.embeddings.token_embedding.weight", (self.vocabulary, width)
        yield f"{stem}.embeddings.position_embedding.weight", (77, width)
        for index in range(self.layers):
            layer = f"{stem}.encoder.layers.{index}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _affine(f"{layer}.self_attn.{name}", width, width)
            yield from _affine(f"{layer}.mlp.fc1", 4 * width, width)
            yield from _affine(f"{layer}.mlp.fc2", width, 4 * width)
            yield from _affine(f"{layer}.layer_norm1", width)
            yield from _affine(f"{layer}.layer_norm2", width)
        yield from _affine(f"{stem}.final_layer_norm", width)

    def _open_clip(self) -> Shapes:
        width = self.width
        yield "model.positional_embedding", (77, width)
        yield "model.token_embedding.weight", (self.vocabulary, width)
        yield "model.text_projection", (width, width)
        yield "model.logit_scale", ()
        for index in range(self.layers):
            block = f"model.transformer.resblocks.{index}"
            yield f"{block}.attn.in_proj_weight", (3 * width, width)
            yield f"{block}.attn.in_proj_bias", (3 * width,)
            yield from _affine(f"{block}.attn.out_proj", width, width)
            yield from _affine(f"{block}.mlp.c_fc", 4 * width, width)
            yield from _affine(f"{block}.mlp.c_proj", width, 4 * width)
            yield from _affine(f"{block}.ln_1", width)
            yield from _affine(f"{block}.ln_2", width)
        yield from _affine("model.ln_final", width)


@dataclass(frozen=True, slots=True)
class Family:
    """A checkpoint: its parts by prefix, each with its parameter count (position_ids not counted)."""

    name: str
    title: str
    parts: tuple[tuple[str, UNet | Vae | TextEncoder, int], ...]

    def specs(self) -> dict[str, Spec]:
        """Every tensor, in the order in which the safetensors library lays a file out.

        Raises:
            AssertionError: a part does not have the parameters that it should have.
        """
        found: dict[str, Spec] = {}
        for prefix, part, expected in self.parts:
            specs = {f"{prefix}.{name}": Spec(shape, _dtype(name)) for name, shape in part.shapes()}
            count = sum(spec.numel for spec in specs.values() if spec.dtype.is_float)
            assert count == expected, f"{self.name}: {prefix} has {count:,} parameters, not {expected:,}"
            found.update(specs)
        return dict(sorted(found.items(), key=lambda item: (-item[1].dtype.bits, item[0])))


def _dtype(name: str) -> DType:
    return DType.I64 if name.endswith("position_ids") else DType.F16


_SD15_UNET = UNet(320, (1, 2, 4, 4), (1, 1, 1, 0), middle_depth=1, context=768)
_SDXL_UNET = UNet(320, (1, 2, 4), (0, 2, 10), middle_depth=10, context=2048, added=2816, linear=True)
_CLIP_L = TextEncoder(width=768, layers=12)
_BIG_G = TextEncoder(width=1280, layers=32, open_clip=True)

SD15 = Family(
    "sd15",
    "SD 1.5",
    (
        ("model.diffusion_model", _SD15_UNET, 859_520_964),
        ("first_stage_model", Vae(128), 83_653_863),
        ("cond_stage_model", _CLIP_L, 123_060_480),
    ),
)
SDXL = Family(
    "sdxl",
    "SDXL",
    (
        ("model.diffusion_model", _SDXL_UNET, 2_567_463_684),
        ("first_stage_model", Vae(128), 83_653_863),
        ("conditioner.embedders.0", _CLIP_L, 123_060_480),
        ("conditioner.embedders.1", _BIG_G, 694_659_840 + 1),  # and logit_scale
    ),
)
FAMILIES = {family.name: family for family in (SD15, SDXL)}

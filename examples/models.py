"""The tiny models: Stable Diffusion 1's topology at toy widths.

As in SD1 there are four levels with two layers each, cross attention in the first three, a KL autoencoder that makes
each side 8 times smaller, and a causal CLIP text encoder of 77 tokens. All widths differ from one another where SD1's
do (context 48; levels 32, 64, 72), so that nothing that is told apart by its width can be mixed up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vocabulary import END, MAX_TOKENS, START

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

CONTEXT = 48
UNET_WIDTHS = (32, 64, 72, 72)
VAE_WIDTHS = (16, 32, 48, 48)


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder: pictures [n, 3, 64, 64] in -1..1 to latents [n, 4, 8, 8].

    It starts as a plain chain of scalings: residual branches add nothing yet, and every other convolution keeps the
    size of its input. Otherwise normalised branches drown the colours, and a short training never finds them again.
    """
    from diffusers import AutoencoderKL
    from torch.nn import Conv2d, init

    model = AutoencoderKL(
        block_out_channels=VAE_WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=2,  # with two channels to a group, normalisation would wash out the colours
        sample_size=64,
    )
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            init.zeros_(module.weight)
        elif isinstance(module, Conv2d) and not name.endswith(".conv1"):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            init.zeros_(module.bias)
    return model


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet: latents [n, 4, 8, 8], steps [n], context [n, 77, 48] to the noise [n, 4, 8, 8]."""
    from diffusers import UNet2DConditionModel

    crossed = ("CrossAttnDownBlock2D",) * 3
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=UNET_WIDTHS,
        down_block_types=(*crossed, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(("CrossAttnUpBlock2D",) * 3)),
        layers_per_block=2,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Return the contrastive pair: a text tower as SD1 uses it, and an image tower of 64 patches of 8x8 pixels."""
    from transformers import CLIPConfig

    shared = {"hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_attention_heads": 4}
    return CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "hidden_act": "quick_gelu",
            "projection_dim": CONTEXT,
            "bos_token_id": tokenizer.convert_tokens_to_ids(START),
            "eos_token_id": tokenizer.convert_tokens_to_ids(END),
            "pad_token_id": tokenizer.convert_tokens_to_ids(END),
        },
        vision_config={
            **shared,
            "num_hidden_layers": 4,
            "image_size": 64,
            "patch_size": 8,
            "hidden_act": "quick_gelu",
            "projection_dim": CONTEXT,
        },
        projection_dim=CONTEXT,
    )


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained contrastive pair.

    Words and places start wider apart than transformers would have them: so short a training never gets to tell
    apart what begins as nearly the same.
    """
    from torch.nn import init
    from transformers import CLIPModel

    model = CLIPModel(clip_config(tokenizer))
    state = model.state_dict()
    init.normal_(state["text_model.embeddings.token_embedding.weight"], std=0.1)
    init.normal_(state["text_model.embeddings.position_embedding.weight"], std=0.05)
    init.normal_(state["vision_model.embeddings.position_embedding.weight"], std=0.15)
    return model


def noise_schedule() -> DDPMScheduler:
    """Return SD1's noise schedule: 1000 steps, square roots of beta evenly spaced, the noise is predicted."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
    )

"""diffusers for SD3: ``transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight``, at scale 1."""

from dataclasses import replace

from sdformats.adapters.layouts import flux_diffusers

LAYOUT = replace(
    flux_diffusers.LAYOUT,
    name="sd3-diffusers",
    title="diffusers' LoRA files for SD3",
    written_by="diffusers, SimpleTuner",
    read_by="diffusers, ComfyUI",
    needs=(r"^transformer\.(transformer_blocks|pos_embed|context_embedder|time_text|norm_out|proj_out)",),
    bars=(r"^transformer\.single_transformer_blocks", r"^unet\."),
    marks=(r"^transformer\.", r"^text_encoder(_[23])?\."),
    families=("sd3",),
    fits=lambda specs: not flux_diffusers.is_flux(specs),
)

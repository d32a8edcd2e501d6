"""What tensors are for, in the names of every family."""

from __future__ import annotations

import pytest

from sdmerge.layer_kinds import KINDS, encoder_layer, kind_of, vae_place

NAMES = {
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": "attn1.q",
    "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_out.0.bias": "attn2.out",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight": "attn2.k",
    "down_blocks.0.attentions.1.transformer_blocks.0.norm2.weight": "norm",
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight": "feed-forward",
    "down_blocks.0.attentions.1.proj_in.weight": "proj in / out",
    "down_blocks.0.resnets.0.conv_shortcut.weight": "conv",
    "down_blocks.0.resnets.0.time_emb_proj.weight": "time / label",
    "down_blocks.0.downsamplers.0.conv.weight": "conv",
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": "norm",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": "conv",
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": "time / label",
    "model.diffusion_model.input_blocks.3.0.op.weight": "conv",
    "model.diffusion_model.input_blocks.0.0.weight": "conv",
    "model.diffusion_model.output_blocks.4.0.skip_connection.weight": "conv",
    "model.diffusion_model.out.0.weight": "norm",
    "model.diffusion_model.out.2.weight": "conv",
    "model.diffusion_model.label_emb.0.0.weight": "time / label",
    "model.diffusion_model.double_blocks.3.img_attn.qkv.weight": "attn.qkv",
    "model.diffusion_model.double_blocks.3.txt_attn.proj.weight": "text attn.out",
    "model.diffusion_model.double_blocks.3.txt_attn.norm.query_norm.scale": "text norm",
    "model.diffusion_model.double_blocks.3.img_mlp.2.weight": "feed-forward",
    "model.diffusion_model.double_blocks.3.txt_mod.lin.weight": "text modulation",
    "model.diffusion_model.single_blocks.3.linear2.weight": "linear2",
    "transformer.transformer_blocks.3.attn.to_q.weight": "attn.q",
    "transformer.transformer_blocks.3.attn.add_k_proj.weight": "text attn.k",
    "transformer.transformer_blocks.3.attn.to_add_out.weight": "text attn.out",
    "transformer.transformer_blocks.3.ff_context.net.2.weight": "text feed-forward",
    "transformer.transformer_blocks.3.norm1_context.linear.weight": "text modulation",
    "transformer.single_transformer_blocks.3.proj_mlp.weight": "linear1",
    "transformer.single_transformer_blocks.3.proj_out.weight": "linear2",
    "joint_blocks.3.context_block.attn.qkv.weight": "text attn.qkv",
    "joint_blocks.3.x_block.adaLN_modulation.1.weight": "modulation",
    "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.out_proj.weight": "attn.out",
    "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight": "feed-forward",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "embedding",
    "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": "attn.qkv",
    "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.weight": "feed-forward",
    "conditioner.embedders.1.model.ln_final.weight": "norm",
    "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.o.weight": "attn.out",
    "text_encoders.t5xxl.transformer.encoder.block.3.layer.1.DenseReluDense.wi_0.weight": "feed-forward",
    "first_stage_model.encoder.mid.attn_1.q.weight": "attn.q",
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": "attn.out",
    "vae.decoder.mid_block.attentions.0.to_v.weight": "attn.v",
    "vae.decoder.mid_block.attentions.0.query.weight": "attn.q",
    "vae.decoder.mid_block.attentions.0.group_norm.weight": "norm",
    "first_stage_model.quant_conv.weight": "conv",
    "alphas_cumprod": "other",
    "v_pred": "other",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert kind in KINDS


def test_layers_of_text_encoders_are_in_order() -> None:
    stem = "cond_stage_model.transformer.text_model."
    names = ["embeddings.token_embedding", "encoder.layers.2.mlp.fc1", "encoder.layers.11.mlp.fc1", "final_layer_norm"]
    places = [encoder_layer(f"{stem}{name}.weight") for name in names]
    assert places == sorted(places)
    assert [label for _, label in places] == ["emb", "2", "11", "end"]
    assert encoder_layer("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight")[1] == "end"
    assert encoder_layer("text_encoder_2.encoder.block.7.layer.0.SelfAttention.q.weight")[1] == "7"
    assert encoder_layer("conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias") == (31, "31")


def test_places_in_a_vae_are_in_the_order_of_the_work_in_both_spellings() -> None:
    single = ("down.0.block.0.conv1", "down.3.block.0.conv1", "mid.attn_1.q", "conv_out")
    folders = (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.3.resnets.0.conv1",
        "mid_block.attentions.0.to_q",
        "conv_out",
    )
    for inside, ups in ((single, ("up.3.x", "up.0.x")), (folders, ("up_blocks.0.x", "up_blocks.3.x"))):
        names = ["encoder.conv_in", *(f"encoder.{one}" for one in inside), "quant_conv", "post_quant_conv"]
        names += ["decoder.conv_in", "decoder.mid.x", *(f"decoder.{one}" for one in ups), "decoder.norm_out"]
        places = [vae_place(f"first_stage_model.{name}.weight") for name in names]
        assert places == sorted(places), inside
        assert len(set(places)) == len(places)
    assert vae_place("what")[1] == "rest"
    assert vae_place("decoder.up.12345678901234567890.x.weight") == vae_place("decoder.up.123.x.weight")

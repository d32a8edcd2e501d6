"""Custom Diffusion's deltas: new weights for keys and values of the cross-attention, and vectors of new words.

::

    original     {"state_dict": {"model.diffusion_model.….attn2.to_k.weight": …, "embed": [n, 768]}}
    delta        {"unet": {"….attn2.to_k.weight": …}, "modifier_token": {"<new1>": [768]}, "text_encoder": {…}}
                 with diffusers' names; of SDXL a word is a list, with a vector for each text encoder
    compressed   either of them, where a weight is {"u": (out, r), "v": (r, in)}: what u v adds to the model's own
    diffusers    a folder: pytorch_custom_diffusion_weights.*, ``….attn2.processor.to_k_custom_diffusion.weight``, and
                 a file for each word, ``<new1>.bin``

Most train to_k and to_v alone, some to_q and to_out too. A safetensors file holds the same tensors under the paths to them.
"""

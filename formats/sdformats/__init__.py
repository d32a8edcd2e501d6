"""What Stable Diffusion model files say: bytes, names and shapes. No torch here, nothing from a file is ever run."""

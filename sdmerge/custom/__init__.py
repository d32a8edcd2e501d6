"""Custom Diffusion's deltas: turned into each other's forms, compressed, and merged in closed form."""

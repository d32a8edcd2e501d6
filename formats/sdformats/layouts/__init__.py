"""The checkpoint layouts: one file for each architecture, naming its single-file and its diffusers spelling."""

from sdformats.layouts import flux, sd, sd3, sdxl

LAYOUTS = (*sd.LAYOUTS, *sdxl.LAYOUTS, *sd3.LAYOUTS, *flux.LAYOUTS)
"""Every layout; see `sdformats.layout.detect`."""

KEY_MAPS = sd.KEY_MAPS | sdxl.KEY_MAPS | sd3.KEY_MAPS | flux.KEY_MAPS
"""How each family is spelled; see `sdformats.keymap`."""

"""ControlNets: half a UNet beside the model. They are recognised, so that their blocks do not pass for a UNet."""

from sdformats.kind import Kind, Marked

KIND = Kind(
    name="controlnet",
    title="a ControlNet",
    layouts=(
        Marked(name="single-file", marks=(r"^control_model\.",), whole=False),
        Marked(name="diffusers", marks=(r"^controlnet_",), whole=False),
    ),
)

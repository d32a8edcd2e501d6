"""sd-scripts' OFT: ``oft_unet_input_blocks_1_1_....oft_blocks``, with the constraint as alpha."""

from sdformats.adapters.layout import AdapterLayout
from sdformats.adapters.naming import Naming, Prefix
from sdformats.adapters.reading import read_named

LAYOUT = AdapterLayout(
    name="kohya-oft",
    title="sd-scripts' orthogonal fine-tuning",
    written_by="sd-scripts (networks.oft)",
    read_by="sd-scripts, A1111",
    holds=frozenset({"oft"}),
    alpha="tensor",
    naming=Naming(
        tuple(Prefix("oft_unet_", "unet", table) for table in ("sgm", "unet", "flux")),
        {end: end for end in ("oft_blocks", "alpha", "oft_diag")},
    ),
    marks=(r"^oft_unet_",),
    read=read_named,
)

"""What A1111 keeps beside an embedding or hypernetwork to go on training it: ``NAME.pt.optim``. Nothing else needs it."""

from sdformats.kind import Kind, Marked

KIND = Kind(
    name="optimizer-state",
    title="an optimizer's state, with which A1111 goes on training (the .pt beside it is the embedding)",
    layouts=(Marked(name="a1111", marks=(r"^optimizer_state_dict\.state\.",)),),
)

"""Hypernetworks: small networks in front of the keys and values of every attention layer of one width.

A layer that reads a context of that width reads ``x + s · K(x)`` for its keys and ``x + s · V(x)`` for its values instead.

::

    a1111     {width: (k, v), …, "step": …, "layer_structure": [1, 2, 1], "activation_func": …, …}
              k and v are state dicts of one torch Sequential, ``linear.I.weight`` and ``linear.I.bias``, where I counts all of
              its slots: each linear layer, then its activation, its norm and its dropout, where it has one
    novelai   {width: (k, v), …} and nothing else; ``linear1`` and ``linear2``, without anything between

A safetensors file holds the same tensors under the paths to them (``768.0.linear.0.weight`` is in k, ``768.1.…`` in v) and
the same settings as metadata: text as it is, all else as JSON. That is what a pickle looks like to `contents`, so both are
read here in one way.
"""

from sdformats.hypernetwork.kind import KIND
from sdformats.hypernetwork.read import describe, read_hypernetwork
from sdformats.hypernetwork.record import Activation, Dropout, Hypernetwork, Linear, Network, Norm, Settings
from sdformats.hypernetwork.write import WRITERS, write_a1111, write_novelai

__all__ = [
    "KIND",
    "WRITERS",
    "Activation",
    "Dropout",
    "Hypernetwork",
    "Linear",
    "Network",
    "Norm",
    "Settings",
    "describe",
    "read_hypernetwork",
    "write_a1111",
    "write_novelai",
]

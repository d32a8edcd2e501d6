"""What can be wrong with an adapter besides its file."""

from __future__ import annotations

from sdformats.errors import FormatError


class CannotHold(FormatError):
    """A layout has no place for something that the adapter changes."""

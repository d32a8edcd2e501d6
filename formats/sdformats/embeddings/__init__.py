"""Textual-inversion embeddings: new words, as vectors for a text encoder's table."""

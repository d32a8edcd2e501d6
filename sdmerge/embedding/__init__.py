"""Work with textual-inversion embeddings: convert, mix, stack, slice, take out of adapters and put into them."""

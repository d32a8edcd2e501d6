"""Work on adapters: converting, baking, extracting, resizing and merging them."""

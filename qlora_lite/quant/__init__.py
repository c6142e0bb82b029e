"""4-bit weights: packing, unpacking and the frozen linear layer that uses them."""

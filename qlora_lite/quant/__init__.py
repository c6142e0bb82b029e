"""4-bit weights: packing, dequantisation and the frozen linear layer that uses them."""

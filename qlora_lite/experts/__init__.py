"""The fused experts of a mixture: their weights in 4 bits, and computing with them."""

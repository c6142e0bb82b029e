"""Where a step's tensors are: blocks recomputed, in tiles or compiled; checkpoints and weights in host
memory."""

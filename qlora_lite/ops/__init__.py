"""What a step computes and where its tensors lie: attention over packed sequences, norms, the chunked loss; blocks
recomputed, in tiles or compiled; checkpoints and weights that wait in host memory."""

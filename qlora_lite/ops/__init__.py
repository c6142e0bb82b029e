"""What a step computes and where its tensors lie: attention over rows laid end to end, norms, the chunked loss; blocks
computed again, in tiles or compiled; checkpoints and weights that wait in host memory."""

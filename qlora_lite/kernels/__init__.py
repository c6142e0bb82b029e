"""What a step computes beside plain operators: attention over packed sequences, norms, gates, the chunked loss, the
products of many experts, and the trial of a fused kernel before it is used."""

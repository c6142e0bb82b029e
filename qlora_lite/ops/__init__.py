"""Tensor operations: attention over rows laid end to end, and the chunked loss."""

"""A CUDA runtime for machines without a GPU, whose kernels do nothing or are computed by the CPU."""

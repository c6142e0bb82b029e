"""Denoisers of diffusion models: task.kind image-generation, and the forms in which other programs take them."""

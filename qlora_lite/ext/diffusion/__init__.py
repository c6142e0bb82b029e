"""Denoisers: the forms in which other programs take their LoRA weights."""

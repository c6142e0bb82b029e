"""Find, check, quantise and load a base model."""

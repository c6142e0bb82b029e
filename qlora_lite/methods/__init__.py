"""The adapter methods that a recipe can name."""

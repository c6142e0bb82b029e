"""From text to examples: tokens, which of them are learned, the stored set, and packs of it as tensors."""

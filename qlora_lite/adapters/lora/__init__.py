"""LoRA weights around frozen linear layers: the layer, its injection, and adapter files."""

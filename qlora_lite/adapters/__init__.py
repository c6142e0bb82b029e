"""What learns in a frozen model: the method that training knows, LoRA, and adapter files in the PEFT format."""

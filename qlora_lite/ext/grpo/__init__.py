"""Learning from the model's own answers and rewards for them: train.objective grpo."""

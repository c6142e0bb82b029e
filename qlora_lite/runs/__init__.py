"""The course of a run: stages, checkpoints, signals, resuming."""

"""Pages, charts and texts about plans, data, memory and runs."""

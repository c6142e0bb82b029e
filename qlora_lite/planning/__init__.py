"""Say before a run what it will need, choose the plan that fits, and show where the memory went."""

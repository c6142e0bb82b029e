"""Workloads, the training step, its optimizer and schedule, the loop around it and the guards."""

"""Measurements of speed, memory and quality beside other ways to do the same; results go to tools/results."""

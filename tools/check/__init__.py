"""Comparisons of the package with what it promises: plans, the order of streams, results before and after a change."""

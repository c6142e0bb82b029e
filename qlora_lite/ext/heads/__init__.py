"""Heads that label texts: task.kind classification, multi-label, regression and reward."""

"""Recipes of other trainers' files: files (its settings) -> values (what becomes of each) -> recipe."""

"""Trainings of a recipe along axes of its settings, compared: the command sweep."""

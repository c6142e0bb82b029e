"""Repositories of the hub: the command push, with a model card."""

"""The tasks of the core; others are in ``ext``."""

"""The wing: one folder for each feature, which the core finds by its name alone (``registry``) and never imports."""

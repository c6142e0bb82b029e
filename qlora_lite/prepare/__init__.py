"""From a recipe to what the lower layers take: models, data, plans, and checks before a run."""

"""From a YAML file to a typed, checked recipe, without importing torch.

strict_yaml (text to values with places) -> schema (settings, defaults, rules) -> load (all problems at once)
-> paths (what the recipe names must be there). foreign_names and reference serve the messages and `qlora-lite explain`;
catalog lists and copies the built-in recipes.
"""

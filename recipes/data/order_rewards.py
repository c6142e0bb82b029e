"""Judge answers to the orders of make_orders.py: the functions that the recipe rewards names."""

import json


def exact_json(completions, references):
    """Give 1 for an answer that is the reference's JSON object, else 0."""
    return [float(parsed(text) == parsed(wanted)) for text, wanted in zip(completions, references, strict=True)]


def right_fields(completions, references):
    """Give the share of the reference's fields that an answer has right."""
    return [share(parsed(text), parsed(wanted)) for text, wanted in zip(completions, references, strict=True)]


def parsed(text):
    """Return the JSON object that a text is; an empty one for any other text."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def share(found, wanted):
    """Return the share of the wanted fields that are found with their value."""
    return sum(found.get(name) == value for name, value in wanted.items()) / len(wanted)

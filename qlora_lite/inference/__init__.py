"""A trained model in use: answers, evaluations, comparisons, a server."""

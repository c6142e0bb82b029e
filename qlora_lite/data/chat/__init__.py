"""From rows to conversations, and from conversations to the text that a chat template writes."""

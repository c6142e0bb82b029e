"""From files to batches in which every token is accounted for.

data_files, sources (files to rows) -> row_formats (rows to conversations) -> template, render
(conversations to text and answers) -> tokenise, mask (text to tokens, and which of them to learn) -> encode, examples
(all of that, counted in statistics, kept in storage and token_cache) -> example_checks (the finished rows looked at
once more) -> batch (rows to packs, packs to tensors, and tensors back to text, for a person).
"""

"""From files to batches in which every token is accounted for.

read (files to rows) -> formats (rows to conversations) -> template, render (conversations to text and answers) ->
mask (text to tokens, and which of them to learn) -> make, examples (all of that, counted) -> check (the finished rows
looked at once more) -> batch (rows to packs, packs to tensors) -> show (tensors back to text, for a person).
"""

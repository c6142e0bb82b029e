"""From files to batches in which every token is accounted for.

read (files to rows) -> formats (rows to conversations) -> template (conversations to text and answers) ->
mask (text to tokens, and which of them to learn) -> examples (all of that, counted) -> batch (rows to packs,
packs to tensors).
"""

"""From files to batches in which every token is accounted for.

readers (files to rows) -> chat (rows to conversations, and those to text) -> tokens (text to examples: which tokens are
learned, stored and cached, and packs of them) -> checks (the finished set: rows held out, rows on both sides, answers
beside their references). Each imports those before it only; what the reader of a set checks while it reads is in
tokens. Pictures, masks, latents, captions and labels are modules beside these folders.
"""

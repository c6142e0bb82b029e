"""From files to rows: which files, what a table or a line of JSON holds, and what is wrong with it."""

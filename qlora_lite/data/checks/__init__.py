"""What is asked of a finished set: rows held out, rows on both sides, and answers beside their references."""

"""The command line: one thin file per group of commands; torch is imported only by commands that compute."""

"""``python -m qlora_lite``: the command line, where its script is not on the path."""

from qlora_lite.cli.main import main

if __name__ == "__main__":
    main()

"""``python -m qwen35_mcore.cli``: the command where its script is not on the path."""

from qwen35_mcore.cli import main

if __name__ == "__main__":
    main()

"""``python -m launcher``: the same as ``python launcher.py``."""

from launcher.cli import main

if __name__ == "__main__":
    main()

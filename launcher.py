"""``python launcher.py worker=main_lmim env.slurm=True``; with no argument it says what to do next."""

from launcher.cli import main

if __name__ == "__main__":
    main()

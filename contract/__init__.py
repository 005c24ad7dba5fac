"""What launcher, workers and analysis agree on: the files of a run directory and the settings of every worker.

Standard library only; imports nothing of ours.
"""

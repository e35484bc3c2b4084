"""Experiments: one file each, to be run, imported, copied and changed; their logs go to runs/logs."""

from hfopt.experiment.memory import keep_freed_memory

# A run uses activations of the same sizes throughout.
keep_freed_memory()

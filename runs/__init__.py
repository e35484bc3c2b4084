"""Experiments: one file each, to be run, imported, copied and changed; their logs go to runs/logs."""

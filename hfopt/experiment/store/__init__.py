"""Runs on disk: the format of a run folder, its writer and its reader."""

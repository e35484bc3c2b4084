"""Experiments: the driver, its data objects and metrics, and the store and pictures of its runs."""

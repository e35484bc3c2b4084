"""Passes over time compiled from C with the machine's own compiler; without one, torch's operators do the work."""

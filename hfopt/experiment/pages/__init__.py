"""Runs as pages for the browser: one file with everything inside, or served live from a folder of runs."""

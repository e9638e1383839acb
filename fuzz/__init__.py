"""Fuzzers of everything that reads a stranger's bytes; `python -m fuzz TARGET` runs one under atheris."""

"""Timing of the grouped GEMMs: python -m benchmarks --help."""

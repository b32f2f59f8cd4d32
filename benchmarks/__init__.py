"""Ratios against named peers: `python -m benchmarks [SYSTEM ...] [--quick]`."""

"""Benchmarks that check before they time: `python -m flatten_ext bench`."""

"""The command line and what it runs: training, evaluation, benchmarks, the demo.

The library does not import this package; it needs the extras that each command names.
"""

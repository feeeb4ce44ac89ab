"""The benchmarks from a checkout: `python benchmarks/run.py --suite tokens` is `flatten-ext bench ...`."""

import sys

from flatten_ext.cli import main

main(["bench", *sys.argv[1:]])

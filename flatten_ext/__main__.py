"""`python -m flatten_ext`, and the script `flatten-ext`."""

from flatten_ext.tools.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()

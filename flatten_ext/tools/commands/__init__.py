"""The commands of `python -m flatten_ext`: each module adds its own with `register(app)`."""

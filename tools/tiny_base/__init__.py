"""Build examples/tiny-base: `python -m tools.tiny_base.train --help`."""

"""How examples/tiny-base was made: `python -m tools.tiny_base.train --help`."""

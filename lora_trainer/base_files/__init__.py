"""Check the files of a base model before anything loads them: no torch, nothing run, nothing unpickled."""

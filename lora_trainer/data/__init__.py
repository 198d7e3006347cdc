"""Training data: its records, how files are read and checked, and which records are held out."""

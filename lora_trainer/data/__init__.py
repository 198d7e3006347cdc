"""Training data: record schema, reading and checking files, and the held-out split."""

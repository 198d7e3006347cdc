"""What a user starts: the pipeline from data to a published adapter, re-evaluation, chat and preflight checks."""

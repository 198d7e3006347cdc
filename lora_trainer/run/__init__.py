"""The work of the commands: the pipeline from data to a published adapter, re-evaluation, chat and preflight checks."""

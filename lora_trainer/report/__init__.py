"""Show results: HTML pages, the model card and tables for the terminal."""

"""Present results: HTML pages, the model card and terminal tables."""

"""Tiki-taka data: dialogues in the seed's format, composed from a grammar or asked of a teacher model."""

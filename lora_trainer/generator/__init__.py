"""Generate tiki-taka training data, by varying hand-written exchanges or requesting dialogues from a teacher model."""

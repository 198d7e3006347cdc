"""Generate tiki-taka training data, by composing dialogues from a grammar or requesting them from a teacher model."""

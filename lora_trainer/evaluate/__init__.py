"""Measure whether an adapter behaves like its persona: questions, rules, confidence bounds, gates."""

"""Measure whether an adapter behaves as its persona: questions, rules, bounds, gates."""

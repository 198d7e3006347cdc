"""Measure how well an adapter plays its persona: questions, rules, confidence bounds and gates."""

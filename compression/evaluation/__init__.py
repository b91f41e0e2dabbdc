"""Measurements of a model: how good it is (classification) and what it costs (efficiency)."""

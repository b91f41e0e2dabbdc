"""The classifier track: what the numbered scripts share."""

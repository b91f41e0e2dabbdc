"""The language-model track: what its scripts share."""

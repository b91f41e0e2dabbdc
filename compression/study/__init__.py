"""Studies: runs of a script over fields of its configuration, shared by any number of workers, and their tables."""

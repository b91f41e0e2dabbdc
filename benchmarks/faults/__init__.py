"""Parts of benchmarks/faults.py: the tiny world that is attacked, the process that is attacked in, each section."""

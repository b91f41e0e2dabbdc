"""Parts of benchmarks/llm_pruning_methods.py."""

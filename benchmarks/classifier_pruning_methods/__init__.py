"""Parts of benchmarks/classifier_pruning_methods.py."""

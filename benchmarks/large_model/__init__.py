"""What benchmarks/large_model.py is made of."""

"""What benchmarks/on_gpu.py is made of."""

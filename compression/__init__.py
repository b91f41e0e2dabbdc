"""Distillation, structured pruning and 4-bit quantization of transformers: what the numbered scripts share."""

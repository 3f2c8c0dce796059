"""Kernels for the processor: the torch reference."""

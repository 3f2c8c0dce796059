"""CUDA, for quantizing: the C source of the native quantizer, compiled for the GPU as it is needed."""

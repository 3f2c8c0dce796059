"""Metal, the GPU of Apple machines: kernels in Metal's language, and the host code that launches them."""

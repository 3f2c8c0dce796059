"""The Metal kernels as one text, for compilers other than torch's: python tools/metal_source.py > kernels.metal"""

from flashpack.kernels.metal.source import source

print(source())

// What all kernels share. They are C++14, as Metal 3.1 has it, and compute in float32. A product that is added is an
// explicit fma: if compilers chose, the same sum could differ between kernels.
#include <metal_stdlib>
#include "blocks.h"

using namespace metal;

enum { LANES = 32 }; // threads of a SIMD group

inline float logistic(float x)
{
    return 1.0f / (1.0f + exp(-x));
}

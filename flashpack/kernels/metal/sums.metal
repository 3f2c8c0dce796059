// Sums over a threadgroup. Their order depends on the sizes of arrays alone: lanes of a SIMD group, or parts of a
// threadgroup, each take every n-th value, and their sums are added up in order.
#include "common.metal"

typedef float4 Quad;

constant constexpr uint MOST_WIDTH = 512; // of a head

// The sum over a threadgroup of `simds` SIMD groups. `sums` [32] is in use until the next barrier.
inline float sum_of_group(float value, threadgroup float* sums, uint lane, uint simd, uint simds)
{
    const float sum = simd_sum(value);
    if (lane == 0)
        sums[simd] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < simds ? sums[lane] : 0.0f);
}

// `sum` and the products of a and b.
inline float add_products(Quad a, Quad b, float sum)
{
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// What is in `sums` [parts, stride] at column `i`, added up.
inline float total_of_parts(threadgroup const float* sums, uint parts, uint stride, uint i)
{
    float total = 0.0f;
    for (uint part = 0; part < parts; part++)
        total += sums[part * stride + i];
    return total;
}

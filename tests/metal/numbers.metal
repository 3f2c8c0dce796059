// Kernels that compute what test_emulator_numbers.py expects of the library.
#include <metal_stdlib>
using namespace metal;

#define LANES(name, T, expression)                                                                  \
    kernel void name(device const T* x [[buffer(0)]], device T* y [[buffer(1)]],                    \
                     uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) { \
        T v = x[i];                                                                                 \
        y[i] = expression;                                                                          \
    }
LANES(sum_float, float, simd_sum(v))
LANES(sum_int, int, simd_sum(v))
LANES(sum_half, half, simd_sum(v))
LANES(product, float, simd_product(v))
LANES(largest, float, simd_max(v))
LANES(smallest, int, simd_min(v))
LANES(all_bits, uint, simd_and(v))
LANES(any_bits, uint, simd_or(v))
LANES(odd_bits, uint, simd_xor(v))
LANES(any_set, uint, simd_any(v == 7u) ? 1u : 0u)
LANES(all_set, uint, simd_all(v < 90u) ? 1u : 0u)
LANES(before, float, simd_prefix_exclusive_sum(v))
LANES(up_to, float, simd_prefix_inclusive_sum(v))
LANES(of_lane, float, simd_shuffle(v, ushort(lane / 2)))
LANES(of_first, float, simd_broadcast_first(v))
LANES(of_third, float, simd_broadcast(v, 3))
LANES(exchanged, float, simd_shuffle_xor(v, 1))
LANES(from_above, float, simd_shuffle_down(v, 5))
LANES(from_below, float, simd_shuffle_up(v, 5))
LANES(vector_sum, float4, simd_sum(v))

kernel void count(device atomic_uint* total [[buffer(0)]], device atomic_float* sum [[buffer(1)]],
                  device atomic_int* largest [[buffer(2)]], device uint* order [[buffer(3)]],
                  uint i [[thread_position_in_grid]]) {
    threadgroup atomic_uint local;
    if (i % 64 == 0) atomic_store_explicit(&local, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&local, 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint seen = atomic_load_explicit(&local, memory_order_relaxed);
    if (i % 64 == 63) atomic_fetch_add_explicit(total, seen, memory_order_relaxed);
    atomic_fetch_add_explicit(sum, 0.5f, memory_order_relaxed);
    atomic_fetch_max_explicit(largest, int(i), memory_order_relaxed);
}
kernel void order(device atomic_uint* next [[buffer(0)]], device uint* taken [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
    taken[i] = atomic_fetch_add_explicit(next, 1u, memory_order_relaxed);
}
kernel void halves(device const half* a [[buffer(0)]], device const bfloat* b [[buffer(1)]],
                   device half* sum [[buffer(2)]], device bfloat* rounded [[buffer(3)]],
                   uint i [[thread_position_in_grid]]) {
    half x = a[i];
    sum[i] = x * x + x - half(0.25f);
    rounded[i] = bfloat(float(b[i]) * 3.0f);
}
kernel void not_fused(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint i [[thread_position_in_grid]]) { y[i] = x[i] * x[i] - 1.0f; }
kernel void bits(device const uint* x [[buffer(0)]], device float* y [[buffer(1)]],
                 uint i [[thread_position_in_grid]]) {
    uchar4 q = as_type<uchar4>(x[i]);
    float4 f = float4(q);
    f.xy = f.yx;
    float4 g = float4(float2(1.0f, 2.0f), f.zw);
    float2 h = float2(as_type<half2>(x[i] & 0x3fff3fffu));
    device float* out = y + i * 8;
    *(device float4*)out = fma(f, g, float4(0.5f));
    out[4] = h.x + h.y;
    out[5] = as_type<float>((x[i] >> 9) | 0x3f800000u);
    out[6] = dot(f, g);
    out[7] = float(popcount(x[i]) * 1000u + clz(x[i] >> 8) * 10u + max(int3(q.xyz), int3(3, 300, -1)).y);
}
kernel void functions(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint i [[thread_position_in_grid]], uint n [[threads_per_grid]]) {
    float v = x[i];
    float values[] = {exp(v), log(v), rsqrt(v), tanh(v), sin(v), pow(v, 1.5f), floor(v), rint(v),
        clamp(v, 0.5f, 1.0f), precise::exp2(v), fast::divide(1.0f, v), float2(sqrt(float2(v, 4.0f))).y, abs(-v),
        select(1.0f, 2.0f, v > 1.0f), metal::sign(v), ldexp(v, 3)};
    for (uint k = 0; k < 16; k++) y[k * n + i] = values[k];
}
kernel void places(device uint* y [[buffer(0)]],
    uint3 in_grid [[thread_position_in_grid]], uint3 grid [[threads_per_grid]],
    uint3 group [[threadgroup_position_in_grid]], uint3 groups [[threadgroups_per_grid]],
    uint3 in_group [[thread_position_in_threadgroup]], uint3 size [[threads_per_threadgroup]],
    ushort index [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]],
    ushort width [[threads_per_simdgroup]], ushort simd [[simdgroup_index_in_threadgroup]],
    ushort simds [[simdgroups_per_threadgroup]]) {
    device uint* out = y + 23 * ((in_grid.z * grid.y + in_grid.y) * grid.x + in_grid.x);
    uint3 vectors[] = {in_grid, grid, group, groups, in_group, size};
    for (uint k = 0; k < 18; k++) out[k] = vectors[k / 3][k % 3];
    out[18] = index; out[19] = lane; out[20] = width; out[21] = simd; out[22] = simds;
}

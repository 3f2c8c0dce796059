// Kernels that are wrong, each in one way; the last ones are right. Compiled together in little more time than one.
#include <metal_stdlib>
using namespace metal;

#define ARGUMENTS device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_index_in_threadgroup]]
struct Wide { float4 a; };

inline float helper(float v) { return simd_sum(v); }
inline void store(threadgroup float* p, uint i, float v) { p[i] = v; }

kernel void no_barrier(ARGUMENTS) {
    threadgroup float shared[256];
    shared[i] = x[i];
    y[i] = shared[i ^ 33u];
}
kernel void barrier_of_other_memory(ARGUMENTS) {
    threadgroup float shared[256];
    shared[i] = x[i];
    threadgroup_barrier(mem_flags::mem_device);
    y[i] = shared[i ^ 33u];
}
kernel void no_barrier_before_next_use(ARGUMENTS) {
    threadgroup float shared[256];
    for (uint k = 0; k < 2; k++) {
        shared[i] = x[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        y[i] = shared[i ^ 33u];
    }
}
kernel void device_memory(ARGUMENTS) {
    y[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x[i] = y[i ^ 33u];
}
kernel void lanes_only(ARGUMENTS) {
    threadgroup float shared[256];
    shared[i] = x[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = shared[i ^ 33u];
}
kernel void all_write_one(ARGUMENTS) {
    threadgroup float one;
    one = 1.0f;
    y[i] = x[i];
}
kernel void groups(device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                   uint i [[thread_position_in_grid]], uint n [[threads_per_grid]]) {
    y[i] = x[i];
    threadgroup_barrier(mem_flags::mem_device);
    x[i] = y[n - 1 - i];
}
kernel void barrier_in_branch(ARGUMENTS) {
    if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = x[i];
}
kernel void two_barriers(ARGUMENTS) {
    if (i < 32)
        threadgroup_barrier(mem_flags::mem_threadgroup);
    else
        threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = x[i];
}
kernel void early_return(ARGUMENTS) {
    if (i == 200) return;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = x[i];
}
kernel void sum_in_branch(ARGUMENTS) {
    float v = x[i];
    if (i % 32 < 7) v = simd_sum(v);
    y[i] = v;
}
kernel void helper_in_both_branches(ARGUMENTS) {
    if (i % 2 == 0) y[i] = helper(x[i]);
    else y[i] = helper(x[i] + 1.0f);
}
kernel void sum_or_barrier(ARGUMENTS) {
    if (i % 32 < 7) y[i] = simd_sum(x[i]);
    else threadgroup_barrier(mem_flags::mem_threadgroup);
}
kernel void ragged_loop(ARGUMENTS) {
    for (uint k = i % 32; k < 50; k += 32) y[i] += simd_max(x[i]);
}
kernel void lane_32(ARGUMENTS) { y[i] = simd_shuffle(x[i], ushort(i % 32 + 1)); }
kernel void missing_lane(ARGUMENTS) { y[i] = simd_shuffle_xor(x[i], 16); }

kernel void beyond_end(ARGUMENTS) { y[i] = x[i + 1]; }
kernel void before_start(ARGUMENTS) { y[i] = x[int(i) - 1]; }
kernel void far_away(ARGUMENTS) { y[i] = x[i + 100000000u]; }
kernel void write_beyond(ARGUMENTS) { y[i + 1] = x[i]; }
kernel void bytes_beyond(device uchar* x [[buffer(0)]], device float* y [[buffer(1)]],
                         uint i [[thread_index_in_threadgroup]]) {
    if (i == 0) x[5] = uchar(y[0]);
}
kernel void constant_beyond(constant Wide& x [[buffer(0)]], device float* y [[buffer(1)]],
                            uint i [[thread_index_in_threadgroup]]) { y[i] = x.a.x + x.a.w; }
kernel void shared_beyond(ARGUMENTS) {
    threadgroup float shared[255];
    store(shared, i, x[i]);
    y[i] = x[i];
}
kernel void index_beyond(ARGUMENTS) {
    float own[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    y[i] = own[uint(x[i]) + 4u];
}
inline void fill(thread float* own, uint n, float v) { for (uint k = 0; k < n; k++) own[k] = v; }
kernel void own_beyond(ARGUMENTS) {
    float own[4];
    fill(own, 5u + uint(x[i]), 1.0f);
    y[i] = own[uint(x[i])];
}
kernel void large_stack(ARGUMENTS) {
    float own[40000];
    for (uint k = 0; k < 40000; k++) own[k] = x[i];
    y[i] = own[uint(x[i])];
}
kernel void misaligned_uint(device uchar* x [[buffer(0)]], device float* y [[buffer(1)]],
                            uint i [[thread_index_in_threadgroup]]) {
    y[i] = float(*(device const uint*)(x + 2));
}
kernel void misaligned_vector(ARGUMENTS) { y[i] = (*(device const float4*)(x + 1)).x; }
kernel void misaligned_constant(constant Wide& x [[buffer(0)]], device float* y [[buffer(1)]],
                                uint i [[thread_index_in_threadgroup]]) { y[i] = x.a.x; }

kernel void shift(ARGUMENTS) { y[i] = float(1u << (32u + uint(x[i]))); }
kernel void overflow(ARGUMENTS) { y[i] = float(0x7fffffff + int(i + 1)); }
kernel void division(ARGUMENTS) { y[i] = float(7u / uint(x[i])); }
kernel void too_large(ARGUMENTS) { y[i] = float(int((x[i] + 1.0f) * 1e20f)); }

kernel void endless(ARGUMENTS) {
    while (x[i] < 1.0f) x[i] *= 0.5f;
    y[i] = x[i];
}
kernel void unset_memory(ARGUMENTS) {
    threadgroup float shared[256];
    if (i < 255) shared[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = shared[i];
}
kernel void unset_variable(ARGUMENTS) {
    float own[2];
    own[0] = x[i];
    y[i] = own[i % 2];
}
kernel void good(ARGUMENTS) {
    threadgroup float shared[256];
    shared[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = helper(shared[i ^ 33u]);
}

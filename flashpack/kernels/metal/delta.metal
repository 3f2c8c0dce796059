// The gated delta rule.
#include "sums.metal"

struct Delta {
    uint key_heads;
    uint value_heads;
    uint key_width;
    uint value_width;
    uint taps;
    uint key_stride;
    uint value_stride;
    uint number_stride;
    uint biased; // whether the filter has a bias
    float epsilon;
};

constant constexpr uint DELTA_THREADS = MOST_WIDTH;

// A causal convolution's next result: x enters behind the inputs in `window`, whose sum with `filter` passes silu.
inline float convolve(float x, device float* window, device const float* filter, float bias, uint taps)
{
    float sum = bias;
    for (uint i = 0; i + 1 < taps; i++) {
        const float next = window[i + 1];
        window[i] = next;
        sum = fma(next, filter[i], sum);
    }
    window[taps - 1] = x;
    sum = fma(x, filter[taps - 1], sum);
    return sum * logistic(sum);
}

// log(1 + e) for e >= 0 to the last bits, where 1 + e is rounded: the error of the sum divides out.
inline float log_of_one_more(float e)
{
    const float sum = 1.0f + e;
    return sum == 1.0f ? e : isinf(sum) ? sum : log(sum) * (e / (sum - 1.0f));
}

// One token of a layer of the gated delta rule: a threadgroup for each key head. All channels that a key head and its
// value heads convolve are theirs alone, so their part of the window is brought up to date by the threadgroup that
// reads it, once; threadgroups for each value head would share the key head's part, and so need another launch.
kernel void delta(
    constant Delta& shape [[buffer(0)]], device const float* query [[buffer(1)]], device const float* key [[buffer(2)]],
    device const float* value [[buffer(3)]], device const float* gate [[buffer(4)]],
    device const float* beta [[buffer(5)]], device const float* alpha [[buffer(6)]],
    device const float* filter [[buffer(7)]], device const float* filter_bias [[buffer(8)]],
    device const float* rate [[buffer(9)]], device const float* rate_bias [[buffer(10)]],
    device const float* norm [[buffer(11)]], device float* window [[buffer(12)]], device float* state [[buffer(13)]],
    device float* out [[buffer(14)]], uint key_head [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]], uint simds [[simdgroups_per_threadgroup]])
{
    threadgroup float asked[2 * MOST_WIDTH];  // the query, then the key
    threadgroup Quad changes[MOST_WIDTH / 4]; // what is added to the state along the key
    threadgroup Quad sums[DELTA_THREADS];
    threadgroup float squares[32];
    const uint keys = shape.key_width, width = shape.value_width, taps = shape.taps;
    const uint shared = shape.value_heads / shape.key_heads;

    for (uint c = thread_index; c < 2 * keys; c += DELTA_THREADS) {
        const uint second = c / keys, i = c % keys, channel = (second * shape.key_heads + key_head) * keys + i;
        device const float* x = second ? key : query;
        asked[c] = convolve(
            x[key_head * shape.key_stride + i], window + channel * taps, filter + channel * taps,
            shape.biased ? filter_bias[channel] : 0.0f, taps);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd < 2) { // both over their lengths, by a SIMD group each
        threadgroup float* own = asked + simd * keys;
        float sum = 0.0f;
        for (uint i = lane; i < keys; i += LANES)
            sum = fma(own[i], own[i], sum);
        const float length = sqrt(simd_sum(sum) + 1e-6f), factor = simd ? 1.0f : 1.0f / sqrt(float(keys));
        for (uint i = lane; i < keys; i += LANES)
            own[i] *= factor / length;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    threadgroup const float* own_query = asked;
    threadgroup const float* own_key = asked + keys;
    threadgroup const float* sums_of_rows = (threadgroup const float*)sums;
    threadgroup float* change = (threadgroup float*)changes;
    const uint quads = width / 4, parts = DELTA_THREADS / quads;
    const uint part = thread_index / quads, quad = thread_index % quads;
    for (uint place = 0; place < shared; place++) {
        const uint head = key_head * shared + place, number = key_head * shape.number_stride + place;
        const uint values = key_head * shape.value_stride + place * width + thread_index;
        device Quad* rows = (device Quad*)(state + ulong(head) * keys * width) + quad;
        const float step = alpha[number] + rate_bias[head];
        const float fade = exp(rate[head] * (step > 20.0f ? step : log_of_one_more(exp(step))));
        const float share = logistic(beta[number]);
        if (part < parts) { // what the state answers to the key; parts take every n-th row
            Quad sum = Quad(0.0f);
#pragma unroll(4) // reads that do not wait for each other
            for (uint i = part; i < keys; i += parts)
                sum = fma(rows[i * quads], Quad(own_key[i]), sum);
            sums[thread_index] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (thread_index < width) {
            const uint channel = 2 * shape.key_heads * keys + head * width + thread_index;
            const float wanted = convolve(
                value[values], window + channel * taps, filter + channel * taps,
                shape.biased ? filter_bias[channel] : 0.0f, taps);
            change[thread_index] = (wanted - fade * total_of_parts(sums_of_rows, parts, width, thread_index)) * share;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (part < parts) {
            const Quad own = changes[quad];
            Quad sum = Quad(0.0f);
            for (uint i = part; i < keys; i += parts) {
                const Quad now = fma(own, Quad(own_key[i]), rows[i * quads] * fade);
                rows[i * quads] = now;
                sum = fma(now, Quad(own_query[i]), sum);
            }
            sums[thread_index] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const float answer = thread_index < width ? total_of_parts(sums_of_rows, parts, width, thread_index) : 0.0f;
        const float square = sum_of_group(answer * answer, squares, lane, simd, simds);
        const float factor = 1.0f / sqrt(square / float(width) + shape.epsilon);
        if (thread_index < width) {
            const float own = gate[values];
            out[head * width + thread_index] = answer * factor * norm[thread_index] * (own * logistic(own));
        }
    }
}

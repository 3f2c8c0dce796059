// The steps of one token between its products. They compute what decode.h, recurrent.h and kernels.cpp of the
// processor's kernels do.
#include "sums.metal"
#include "attention.metal"
#include "delta.metal"

struct AddNorm {
    uint width;
    uint adds;   // whether there is a y
    uint weighs; // whether there is a weight
    float epsilon;
};

// x [width] += y, then out = x over its root mean square, times weight. One threadgroup.
kernel void add_norm(
    constant AddNorm& shape [[buffer(0)]], device float* x [[buffer(1)]], device const float* y [[buffer(2)]],
    device const float* weight [[buffer(3)]], device float* out [[buffer(4)]],
    uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]])
{
    threadgroup float sums[32];
    float sum = 0.0f;
    for (uint i = thread_index; i < shape.width; i += threads) {
        float value = x[i];
        if (shape.adds) {
            value += y[i];
            x[i] = value;
        }
        sum = fma(value, value, sum);
    }
    sum = sum_of_group(sum, sums, lane, simd, simds);
    const float factor = 1.0f / sqrt(sum / float(shape.width) + shape.epsilon);
    for (uint i = thread_index; i < shape.width; i += threads)
        out[i] = shape.weighs ? x[i] * factor * weight[i] : x[i] * factor;
}

struct Route {
    uint experts;
    uint top_k;
    uint mode; // of the enum below, as in kernels.h
    uint divides;
    uint biased;
    float factor;
};

enum { SOFTMAX_TOP = 0, TOP_SOFTMAX = 1, SIGMOID_TOP = 2 };

constant constexpr uint MOST_EXPERTS = 4096;
constant constexpr uint NOBODY = 0xFFFFFFFF;

// The `top_k` largest of a router's logits [experts], largest first (the first of equals first), with their weights; an
// expert whose score is no number, or minus infinity, is not chosen: where too few are left, -1 and not a number.
// One SIMD group, whose lanes take every 32nd expert and nobody else's, so there is nothing to wait for.
kernel void route(
    constant Route& shape [[buffer(0)]], device const float* logits [[buffer(1)]],
    device const float* bias [[buffer(2)]], device int* chosen [[buffer(3)]], device float* weights [[buffer(4)]],
    uint lane [[thread_index_in_simdgroup]])
{
    threadgroup float scores[MOST_EXPERTS];
    const bool sigmoid = shape.mode == SIGMOID_TOP;
    float most = -INFINITY, sum = 0.0f;
    for (uint e = lane; e < shape.experts; e += LANES)
        most = max(most, logits[e]);
    most = simd_max(most);
    for (uint e = lane; e < shape.experts; e += LANES) {
        const float value = sigmoid ? logistic(logits[e]) : exp(logits[e] - most);
        sum += value;
        scores[e] = !sigmoid ? logits[e] : shape.biased ? value + bias[e] : value;
    }
    sum = simd_sum(sum);
    float total = 0.0f; // of the chosen
    for (uint k = 0; k < shape.top_k; k++) {
        float best = -INFINITY;
        uint expert = NOBODY;
        for (uint e = lane; e < shape.experts; e += LANES)
            if (scores[e] > best) {
                best = scores[e];
                expert = e;
            }
        expert = simd_min(best == simd_max(best) ? expert : NOBODY);
        const bool found = expert != NOBODY;
        const float logit = found ? logits[expert] : NAN;
        const float weight = sigmoid ? logistic(logit) : exp(logit - most);
        total += weight;
        if (lane == k % LANES) {
            chosen[k] = found ? int(expert) : -1;
            weights[k] = weight;
        }
        if (found && lane == expert % LANES)
            scores[expert] = -INFINITY;
    }
    const float divisor = sigmoid ? (shape.divides ? total + 1e-20f : 1.0f)
        : shape.divides || shape.mode == TOP_SOFTMAX ? total : sum;
    for (uint k = lane; k < shape.top_k; k += LANES)
        weights[k] = weights[k] / divisor * shape.factor;
}

// The results of a token's experts, added up.
#include "common.metal"

struct Combine {
    uint width;
    uint top_k;
};

// y [tokens, width]: over k in order, weights [tokens, top_k] times the rows of `outputs` that `places` [tokens, top_k]
// names; negative: zeros. A thread has a column of a token.
kernel void combine(
    constant Combine& shape [[buffer(0)]], device const float* outputs [[buffer(1)]],
    device const int* places [[buffer(2)]], device const float* weights [[buffer(3)]], device float* y [[buffer(4)]],
    uint2 at [[thread_position_in_grid]])
{
    float total = 0.0f;
    for (uint k = at.y * shape.top_k; k < (at.y + 1) * shape.top_k; k++)
        if (places[k] >= 0)
            total = fma(weights[k], outputs[ulong(places[k]) * shape.width + at.x], total);
    y[ulong(at.y) * shape.width + at.x] = total;
}

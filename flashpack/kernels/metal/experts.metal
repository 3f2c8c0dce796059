// Networks of experts: gate and up with the activation, down, and down added up for the experts of a token.
#include "products.metal"

// Some tokens of one expert, whose record begins at `base`: the pairs of a token and an expert from `first` on.
struct Tile {
    uint base;
    uint first;
    uint count;
};

// What stands between an expert's matrices: one of interface.py's ACTIVATIONS, by its number there.
struct Between {
    uint function;
    uint gated;
    float limit;
};

inline float activated(uint function, float limit, float gate, float up)
{
    switch (function) {
    case 0: // silu
        return gate * logistic(gate) * up;
    case 1: { // gelu; the error function as in Abramowitz and Stegun, 7.1.26, off by 1.5e-7 at most
        const float z = fabs(gate) * M_SQRT1_2_F, t = 1.0f / fma(0.3275911f, z, 1.0f);
        float p = fma(1.061405429f, t, -1.453152027f);
        p = fma(p, t, 1.421413741f);
        p = fma(p, t, -0.284496736f);
        p = fma(p, t, 0.254829592f);
        const float less = exp(-z * z);
        return 0.5f * gate * (gate < 0.0f ? p * t * less : fma(-p * t, less, 2.0f)) * up;
    }
    case 2: // gelu_tanh: (1 + tanh y) / 2 is logistic(2 y)
        return gate * logistic(1.59576912f * fma(0.044715f * gate * gate, gate, gate)) * up;
    case 3: { // relu2
        const float positive = max(gate, 0.0f);
        return positive * positive * up;
    }
    default: { // swiglu_oai
        const float x = min(gate, limit), y = clamp(up, -limit, limit);
        return x * logistic(1.702f * x) * (y + 1.0f);
    }
    }
}

// Gate and up, and the function between: of a gated expert half of the rows are gate's, the others the same ones of up.
template <class Format, uint T>
inline void experts_up(
    device const uchar* slab, constant Layout* layouts, constant Between& between, device const Tile* tiles,
    device const int* inputs, device const float* x, device float* hidden, uint tile, uint block, uint lane)
{
    constant Layout& m = layouts[0];
    const uint own = between.gated ? ROWS / 2 : ROWS, first = block * own;
    if (first >= m.rows)
        return;
    device const uchar* matrix = matrix_at(slab, tiles[tile].base);
    const uint pair = tiles[tile].first, count = tiles[tile].count;
    Row rows[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++) {
        const bool up = r >= own;
        rows[r] = row_of<Format>(matrix, layouts[up], min(first + (up ? r - own : r), m.rows - 1));
    }
    uint tokens[T];
    UNROLL for (uint t = 0; t < T; t++)
        tokens[t] = uint(inputs[pair + min(t, count - 1)]);
    float sums[ROWS * T];
    multiply<Format, ROWS, T>(rows, m, x, tokens, count, lane, sums);
    const float gate = gathered<ROWS * T>(sums, lane);
    const float up = simd_shuffle_down(gate, ushort(ROWS / 2 * T));
    const uint row = first + lane / T, token = lane % T;
    if (lane < own * T && row < m.rows && token < count) {
        const float g = added(gate, matrix, m, row);
        const float u = between.gated ? added(up, matrix, layouts[1], row) : 1.0f;
        hidden[ulong(pair + token) * m.rows + row] = activated(between.function, between.limit, g, u);
    }
}

// A matrix of each expert times rows of x: `inputs` are those of the pairs.
template <class Format, uint T>
inline void experts_down(
    device const uchar* slab, constant Layout& m, device const Tile* tiles, device const int* inputs,
    device const float* x, device float* out, uint tile, uint block, uint lane)
{
    const uint first = block * ROWS;
    if (first >= m.rows)
        return;
    device const uchar* matrix = matrix_at(slab, tiles[tile].base);
    const uint pair = tiles[tile].first, count = tiles[tile].count;
    Row rows[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++)
        rows[r] = row_of<Format>(matrix, m, min(first + r, m.rows - 1));
    uint tokens[T];
    UNROLL for (uint t = 0; t < T; t++)
        tokens[t] = uint(inputs[pair + min(t, count - 1)]);
    float sums[ROWS * T];
    multiply<Format, ROWS, T>(rows, m, x, tokens, count, lane, sums);
    const float y = gathered<ROWS * T>(sums, lane);
    const uint row = first + lane / T, token = lane % T;
    if (lane < ROWS * T && row < m.rows && token < count)
        out[ulong(pair + token) * m.rows + row] = added(y, matrix, m, row);
}

// `count` tiles of one pair each; their weights begin at `first`. `goes_on`: what is in the result is added to.
struct Sum {
    uint count;
    uint first;
    uint goes_on;
};

// What experts_down and then combine compute for one token, bit for bit: the weighted sum over its experts, in order.
template <class Format>
inline void experts_sum(
    device const uchar* slab, constant Layout& m, constant Sum& sum, device const Tile* tiles,
    device const float* weights, device const float* hidden, device float* out, uint block, uint lane)
{
    const uint first = block * ROWS, row = first + lane;
    if (first >= m.rows)
        return;
    const bool writes = lane < ROWS && row < m.rows;
    float total = writes && sum.goes_on ? out[row] : 0.0f;
    for (uint k = 0; k < sum.count; k++) {
        device const uchar* matrix = matrix_at(slab, tiles[k].base);
        Row rows[ROWS];
        UNROLL for (uint r = 0; r < ROWS; r++)
            rows[r] = row_of<Format>(matrix, m, min(first + r, m.rows - 1));
        const uint pair = tiles[k].first;
        float sums[ROWS];
        multiply<Format, ROWS, 1>(rows, m, hidden, &pair, 1, lane, sums);
        const float y = gathered<ROWS>(sums, lane);
        if (writes)
            total = fma(weights[sum.first + k], added(y, matrix, m, row), total);
    }
    if (writes)
        out[row] = total;
}

#define EXPERTS_OF(NAME, FORMAT, T)                                                                            \
    kernel void experts_up##NAME(                                                                              \
        device const uchar* slab [[buffer(0)]], constant Layout* layouts [[buffer(1)]],                        \
        constant Between& between [[buffer(2)]], device const Tile* tiles [[buffer(3)]],                       \
        device const int* inputs [[buffer(4)]], device const float* x [[buffer(5)]],                           \
        device float* hidden [[buffer(6)]], WHERE)                                                             \
    {                                                                                                          \
        experts_up<FORMAT, T>(                                                                                 \
            slab, layouts, between, tiles, inputs, x, hidden, group.x, group.y * SIMDS + simd, lane);          \
    }                                                                                                          \
    kernel void experts_down##NAME(                                                                            \
        device const uchar* slab [[buffer(0)]], constant Layout& layout [[buffer(1)]],                         \
        device const Tile* tiles [[buffer(2)]], device const int* inputs [[buffer(3)]],                        \
        device const float* x [[buffer(4)]], device float* out [[buffer(5)]], WHERE)                           \
    {                                                                                                          \
        experts_down<FORMAT, T>(slab, layout, tiles, inputs, x, out, group.x, group.y * SIMDS + simd, lane);   \
    }

#define EXPERTS(NAME, FORMAT)                                                                                  \
    EXPERTS_OF(_##NAME, FORMAT, 1)                                                                             \
    EXPERTS_OF(_many_##NAME, FORMAT, TILE)                                                                     \
    kernel void experts_sum_##NAME(                                                                            \
        device const uchar* slab [[buffer(0)]], constant Layout& layout [[buffer(1)]],                         \
        constant Sum& sum [[buffer(2)]], device const Tile* tiles [[buffer(3)]],                               \
        device const float* weights [[buffer(4)]], device const float* hidden [[buffer(5)]],                   \
        device float* out [[buffer(6)]], WHERE)                                                                \
    {                                                                                                          \
        experts_sum<FORMAT>(                                                                                   \
            slab, layout, sum, tiles, weights, hidden, out, group.y * SIMDS + simd, lane);                     \
    }

// Products of stored matrices with activations.
//
// A SIMD group takes ROWS rows of a matrix and all their columns, in units of 16 values: lane l takes units l, l + 32,
// and so on, so that neighbours read neighbouring words, and activations are loaded once for all the rows. Results need
// no threadgroup memory. For each row and token the operations and their order are the same, whatever is computed
// beside it and by whichever kernel.
//
// Of affine groups the sum of q * x is multiplied by the scale and the sum of x by the bias: one fused multiplication
// for a code, where fma(q, scale, bias) * x takes two. The sum of x is shared by the rows.
#include "formats.metal"

constant constexpr uint ROWS = 4;     // of a SIMD group
constant constexpr uint TILE = 4;     // tokens that share a row that has been unpacked
constant constexpr uint MATRICES = 4; // of one launch
constant constexpr uint SIMDS = 2;    // SIMD groups of a threadgroup; they have nothing in common

// A lane's share of R rows times `count` of T rows of x, those that `tokens` names: sums[r * T + t].
template <class Format, uint R, uint T>
inline void multiply(
    thread const Row* rows, constant Layout& m, device const float* x, thread const uint* tokens, uint count, uint lane,
    thread float* sums)
{
    UNROLL for (uint i = 0; i < R * T; i++)
        sums[i] = 0.0f;
    const uint units = (m.width + UNIT - 1) / UNIT;
    for (uint unit = lane; unit < units; unit += LANES) {
        const uint start = unit * UNIT, left = m.width - start;
        float values[T * UNIT], totals[T];
        UNROLL for (uint t = 0; t < T; t++) {
            device const float* from = x + ulong(tokens[t]) * m.width + start;
            totals[t] = 0.0f;
            UNROLL for (uint i = 0; i < UNIT; i++) {
                const float value = !Format::RAGGED || i < left ? from[i] : 0.0f;
                totals[t] += value;
                values[t * UNIT + i] = value * Format::place(i);
            }
        }
        float scales[R], biases[R];
        Format::template scales<R>(rows, m, unit, scales, biases);
        UNROLL for (uint r = 0; r < R; r++) {
            float codes[UNIT];
            Format::codes(rows[r], m, unit, codes);
            UNROLL for (uint t = 0; t < T; t++) {
                if (t >= count)
                    continue;
                float product = 0.0f;
                UNROLL for (uint i = 0; i < UNIT; i++)
                    product = fma(codes[i], values[t * UNIT + i], product);
                const uint at = r * T + t;
                if (Format::BIASED)
                    sums[at] = fma(biases[r], totals[t], sums[at]);
                sums[at] = fma(scales[r], product * float(Format::FACTOR), sums[at]);
            }
        }
    }
}

// The sums of N values over all lanes: lane i < N gets the i-th.
template <uint N> inline float gathered(thread const float* values, uint lane)
{
    float mine = 0.0f;
    UNROLL for (uint i = 0; i < N; i++) {
        const float sum = simd_sum(values[i]);
        mine = lane == i ? sum : mine;
    }
    return mine;
}

// `y`, with what is added to products of a row.
inline float added(float y, device const uchar* matrix, constant Layout& m, uint row)
{
    return m.add == NONE ? y : y + number_of(part_at(matrix, m.add), m.add_type, row);
}

// Matrices in one slab. `ends`: blocks of ROWS rows up to the end of each. `adds`: where in the numbers to be added
// those of its rows begin, or NONE.
struct Linear {
    Layout layouts[MATRICES];
    uint bases[MATRICES];
    uint ends[MATRICES];
    uint adds[MATRICES];
};

// One token times several matrices.
template <class Format>
inline void products_of(
    device const uchar* slab, constant Linear& l, device const float* x, device const float* add, device float* out,
    device float* out1, device float* out2, device float* out3, uint block, uint lane)
{
    if (block >= l.ends[MATRICES - 1])
        return;
    uint i = 0;
    while (block >= l.ends[i])
        i++;
    constant Layout& m = l.layouts[i];
    device const uchar* matrix = matrix_at(slab, l.bases[i]);
    const uint first = (i ? block - l.ends[i - 1] : block) * ROWS;
    Row rows[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++)
        rows[r] = row_of<Format>(matrix, m, min(first + r, m.rows - 1));
    const uint token = 0;
    float sums[ROWS];
    multiply<Format, ROWS, 1>(rows, m, x, &token, 1, lane, sums);
    const float y = gathered<ROWS>(sums, lane);
    const uint row = first + lane;
    if (lane < ROWS && row < m.rows) {
        device float* to = i == 0 ? out : i == 1 ? out1 : i == 2 ? out2 : out3;
        to[row] = l.adds[i] == NONE ? y : y + add[l.adds[i] + row];
    }
}

// Many tokens times the first of the matrices.
template <class Format>
inline void products_of_many(
    device const uchar* slab, constant Linear& l, uint tokens, device const float* x, device float* out, uint tile,
    uint block, uint lane)
{
    constant Layout& m = l.layouts[0];
    if (block >= l.ends[0])
        return;
    const uint first = block * ROWS, start = tile * TILE, count = min(TILE, tokens - start);
    Row rows[ROWS];
    UNROLL for (uint r = 0; r < ROWS; r++)
        rows[r] = row_of<Format>(matrix_at(slab, l.bases[0]), m, min(first + r, m.rows - 1));
    uint inputs[TILE];
    UNROLL for (uint t = 0; t < TILE; t++)
        inputs[t] = min(start + t, tokens - 1);
    float sums[ROWS * TILE];
    multiply<Format, ROWS, TILE>(rows, m, x, inputs, count, lane, sums);
    const float y = gathered<ROWS * TILE>(sums, lane);
    const uint row = first + lane / TILE, token = lane % TILE;
    if (lane < ROWS * TILE && row < m.rows && token < count)
        out[ulong(start + token) * m.rows + row] = y;
}

// Rows of the first of the matrices, by their numbers; a thread has a unit of one. No such row: NaN.
template <class Format>
inline void rows_of(
    device const uchar* slab, constant Linear& l, device const int* ids, device float* out, uint unit, uint i)
{
    constant Layout& m = l.layouts[0];
    const uint id = uint(ids[i]), start = unit * UNIT;
    const Row row = row_of<Format>(matrix_at(slab, l.bases[0]), m, min(id, m.rows - 1));
    float values[UNIT], scale, bias;
    Format::codes(row, m, unit, values);
    Format::template scales<1>(&row, m, unit, &scale, &bias);
    for (uint j = 0; j < UNIT && start + j < m.width; j++) {
        float value = values[j] * Format::place(j) * float(Format::FACTOR) * scale;
        if (Format::BIASED)
            value += bias;
        out[ulong(i) * m.width + start + j] = id < m.rows ? value : NAN;
    }
}

// The kernels of a format; source.py appends a line for each. Grids are of threadgroups of SIMDS SIMD groups: in x
// tiles, in y blocks of rows, one for each SIMD group.

#define WHERE                                                                                                  \
    uint2 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],                \
        uint lane [[thread_index_in_simdgroup]]

#define PRODUCTS(NAME, FORMAT)                                                                                 \
    kernel void linear_##NAME(                                                                                 \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        device const float* x [[buffer(2)]], device const float* add [[buffer(3)]],                            \
        device float* out [[buffer(4)]], device float* out1 [[buffer(5)]], device float* out2 [[buffer(6)]],   \
        device float* out3 [[buffer(7)]], WHERE)                                                               \
    {                                                                                                          \
        products_of<FORMAT>(slab, matrices, x, add, out, out1, out2, out3, group.y * SIMDS + simd, lane);      \
    }                                                                                                          \
    kernel void linear_many_##NAME(                                                                            \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        constant uint& tokens [[buffer(2)]], device const float* x [[buffer(3)]],                              \
        device float* out [[buffer(4)]], WHERE)                                                                \
    {                                                                                                          \
        products_of_many<FORMAT>(slab, matrices, tokens, x, out, group.x, group.y * SIMDS + simd, lane);       \
    }                                                                                                          \
    kernel void rows_##NAME(                                                                                   \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        device const int* ids [[buffer(2)]], device float* out [[buffer(3)]],                                  \
        uint2 at [[thread_position_in_grid]])                                                                  \
    {                                                                                                          \
        rows_of<FORMAT>(slab, matrices, ids, out, at.x, at.y);                                                 \
    }

// Products of stored matrices with activations.
//
// A SIMD group takes ROWS rows of a matrix and all their columns, in units of 16 values: lane l takes units l, l + 32,
// and so on, so that neighbours read neighbouring words, and activations are loaded once for all the rows. Results need
// no threadgroup memory. For each row and token the operations and their order are the same, whatever is computed
// beside it and by whichever kernel.
//
// Of affine groups the sum of q * x is multiplied by the scale and the sum of x by the bias: one fused multiplication
// for a code, where fma(q, scale, bias) * x takes two. The sum of x is shared by the rows.
#include "common.metal"

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr uint UNIT = 16;      // values
constant constexpr uint ROWS = 4;       // of a SIMD group
constant constexpr uint TILE = 4;       // tokens that share a row that has been unpacked
constant constexpr uint MATRICES = 4;   // of one launch
constant constexpr uint SIMDS = 2;      // SIMD groups of a threadgroup; they have nothing in common
constant constexpr uint NONE = 0xFFFFFFFF;

// How a matrix is stored (layouts.py). Offsets of its parts, from where it begins, in units of 16 bytes.
struct Layout {
    uint rows;
    uint width;
    uint weight;
    uint scales;
    uint biases;
    uint global_scale;
    uint add; // numbers that are added to the product, or NONE
    uint add_type;
    uint scale_type;
    uint scale_columns;
    uint shift;         // of affine and mxfp4 groups: 2^shift units each
    uint block_rows;    // rows that share scales, 0 for all
    uint block_columns; // of fp8, 0 for all
    uint first;         // the number of the first row in its block
    uint whole;         // of fp8: whether units are whole words, and no two scales share one
    uint global_rule;
};

// Where a matrix begins. `base`: in units of 64 bytes.
inline device const uchar* matrix_at(device const uchar* slab, uint base)
{
    return slab + ulong(base) * 64;
}

inline device const uchar* part_at(device const uchar* matrix, uint offset)
{
    return matrix + ulong(offset) * 16;
}

template <uint TYPE> inline float number(device const uchar* at, uint i)
{
    if (TYPE == blocks::F32)
        return ((device const float*)at)[i];
    if (TYPE == blocks::F16)
        return float(((device const half*)at)[i]);
    return as_type<float>(uint(((device const ushort*)at)[i]) << 16);
}

inline float number_of(device const uchar* at, uint type, uint i)
{
    return type == blocks::F32 ? number<blocks::F32>(at, i) : type == blocks::F16 ? number<blocks::F16>(at, i)
                                                                                   : number<blocks::BF16>(at, i);
}

inline float e4m3(uint code)
{
    const float value = float(as_type<half>(ushort(blocks::fp8_half(code)))) * float(blocks::FP8_SCALE);
    return blocks::fp8_is_nan(code) ? NAN : value;
}

inline float e8m0(uint code)
{
    return as_type<float>(blocks::e8m0_bits(code));
}

// A row where it is stored.
struct Row {
    device const uchar* weight;
    device const uchar* scales;
    device const uchar* biases;
    float global_scale;
};

template <class Format> inline Row row_of(device const uchar* matrix, constant Layout& m, uint row)
{
    const uint scale_row = m.block_rows ? (row + m.first) / m.block_rows : 0;
    const ulong scales = ulong(scale_row) * (m.scale_columns * blocks::size_of(m.scale_type));
    Row found;
    found.weight = part_at(matrix, m.weight) + ulong(row) * Format::bytes(m.width);
    found.scales = part_at(matrix, m.scales) + scales;
    found.biases = part_at(matrix, m.biases) + scales;
    found.global_scale = m.global_rule ? *(device const float*)part_at(matrix, m.global_scale) : 1.0f;
    return found;
}

// Formats. Value i of a unit is codes[i] * place(i) * FACTOR * scale, and bias if it is BIASED. RAGGED: the last unit of
// a row may have fewer values. `place` and FACTOR are powers of two, which spare a shift or a product for each code.

template <uint BITS> struct Affine {
    enum { BIASED = 1, RAGGED = 0, FACTOR = 1 };

    static ulong bytes(uint width) { return blocks::bytes_of(BITS, width); }

    // A code that is in one word stays at its place there.
    static float place(uint i)
    {
        return blocks::is_split(BITS, i) ? 1.0f : as_type<float>((127 - blocks::shift_of(BITS, i)) << 23);
    }

    static void codes(Row row, constant Layout&, uint unit, thread float* values)
    {
        const uint mask = blocks::mask_of(BITS);
        uint words[(BITS + 1) / 2];
        if (BITS % 2 == 0) {
            device const uint* from = (device const uint*)row.weight + unit * (BITS / 2);
            UNROLL for (uint i = 0; i < BITS / 2; i++)
                words[i] = from[i];
        } else {
            device const ushort* from = (device const ushort*)row.weight + unit * BITS;
            UNROLL for (uint i = 0; i < BITS; i++)
                words[i / 2] = i % 2 ? words[i / 2] | uint(from[i]) << 16 : uint(from[i]);
        }
        UNROLL for (uint i = 0; i < UNIT; i++) {
            const uint word = blocks::word_of(BITS, i), shift = blocks::shift_of(BITS, i);
            if (blocks::is_split(BITS, i))
                values[i] = float((words[word] >> shift | words[word + 1] << (32 - shift)) & mask);
            else
                values[i] = float(words[word] & mask << shift);
        }
    }

    template <uint TYPE, uint R>
    static void scales_of(thread const Row* rows, uint group, thread float* scales, thread float* biases)
    {
        UNROLL for (uint r = 0; r < R; r++) {
            scales[r] = number<TYPE>(rows[r].scales, group);
            biases[r] = number<TYPE>(rows[r].biases, group);
        }
    }

    template <uint R>
    static void scales(
        thread const Row* rows, constant Layout& m, uint unit, thread float* scales, thread float* biases)
    {
        const uint group = unit >> m.shift;
        if (m.scale_type == blocks::BF16)
            scales_of<blocks::BF16, R>(rows, group, scales, biases);
        else if (m.scale_type == blocks::F16)
            scales_of<blocks::F16, R>(rows, group, scales, biases);
        else
            scales_of<blocks::F32, R>(rows, group, scales, biases);
    }
};

inline void fp4_codes(device const uchar* weight, uint unit, thread float* values)
{
    device const uint* words = (device const uint*)weight + unit * 2;
    UNROLL for (uint i = 0; i < 2; i++) {
        const uint word = words[i];
        UNROLL for (uint j = 0; j < 4; j++) {
            const half2 both = as_type<half2>(blocks::fp4_halves(word >> 4 * j));
            values[8 * i + j] = float(both.x);
            values[8 * i + j + 4] = float(both.y);
        }
    }
}

struct Mxfp4 {
    enum { BIASED = 0, RAGGED = 0, FACTOR = blocks::FP4_SCALE };

    static ulong bytes(uint width) { return blocks::bytes_of(4, width); }

    static float place(uint) { return 1.0f; }

    static void codes(Row row, constant Layout&, uint unit, thread float* values)
    {
        fp4_codes(row.weight, unit, values);
    }

    template <uint R>
    static void scales(thread const Row* rows, constant Layout& m, uint unit, thread float* scales, thread float*)
    {
        UNROLL for (uint r = 0; r < R; r++)
            scales[r] = e8m0(rows[r].scales[unit >> m.shift]);
    }
};

struct Nvfp4 {
    enum { BIASED = 0, RAGGED = 0, FACTOR = blocks::FP4_SCALE };

    static ulong bytes(uint width) { return blocks::bytes_of(4, width); }

    static float place(uint) { return 1.0f; }

    static void codes(Row row, constant Layout&, uint unit, thread float* values)
    {
        fp4_codes(row.weight, unit, values);
    }

    template <uint R>
    static void scales(thread const Row* rows, constant Layout& m, uint unit, thread float* scales, thread float*)
    {
        UNROLL for (uint r = 0; r < R; r++) {
            const float scale = e4m3(rows[r].scales[unit]);
            scales[r] = m.global_rule == blocks::GLOBAL_DIVIDE ? scale / rows[r].global_scale
                                                               : scale * rows[r].global_scale;
        }
    }
};

struct Fp8 {
    enum { BIASED = 0, RAGGED = 1, FACTOR = 1 };

    static ulong bytes(uint width) { return width; }

    static float place(uint) { return 1.0f; }

    static float scale(Row row, constant Layout& m, uint column)
    {
        const uint i = m.block_columns ? column / m.block_columns : 0;
        return m.scale_type == blocks::E8M0 ? e8m0(row.scales[i]) : number_of(row.scales, m.scale_type, i);
    }

    static void codes(Row row, constant Layout& m, uint unit, thread float* values)
    {
        if (m.whole) {
            device const uint* words = (device const uint*)row.weight + unit * 4;
            UNROLL for (uint i = 0; i < 4; i++) {
                const uint word = words[i];
                UNROLL for (uint j = 0; j < 4; j++)
                    values[4 * i + j] = e4m3(word >> 8 * j & 255);
            }
        } else {
            UNROLL for (uint i = 0; i < UNIT; i++) {
                const uint column = unit * UNIT + i;
                values[i] = column < m.width ? e4m3(row.weight[column]) * scale(row, m, column) : 0.0f;
            }
        }
    }

    template <uint R>
    static void scales(thread const Row* rows, constant Layout& m, uint unit, thread float* scales, thread float*)
    {
        UNROLL for (uint r = 0; r < R; r++)
            scales[r] = m.whole ? scale(rows[r], m, unit * UNIT) : 1.0f;
    }
};

template <uint TYPE> struct Plain {
    enum { BIASED = 0, RAGGED = 1, FACTOR = 1 };

    static ulong bytes(uint width) { return ulong(width) * blocks::size_of(TYPE); }

    static float place(uint) { return 1.0f; }

    static void codes(Row row, constant Layout& m, uint unit, thread float* values)
    {
        const uint start = unit * UNIT, left = m.width - start;
        if (left >= UNIT) {
            UNROLL for (uint i = 0; i < UNIT; i++)
                values[i] = number<TYPE>(row.weight, start + i);
        } else {
            UNROLL for (uint i = 0; i < UNIT; i++)
                values[i] = i < left ? number<TYPE>(row.weight, start + i) : 0.0f;
        }
    }

    template <uint R>
    static void scales(thread const Row*, constant Layout&, uint, thread float* scales, thread float*)
    {
        UNROLL for (uint r = 0; r < R; r++)
            scales[r] = 1.0f;
    }
};

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

// The kernels of a format; source.py appends PRODUCTS(name, type) for each. Grids are of threadgroups of SIMDS SIMD
// groups: in x tiles, in y blocks of rows, one for each SIMD group.

#define WHERE                                                                                                  \
    uint2 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],                \
        uint lane [[thread_index_in_simdgroup]]

#define EXPERTS(NAME, FORMAT, T)                                                                               \
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

#define PRODUCTS(NAME, FORMAT)                                                                                 \
    kernel void linear_##NAME(                                                                                 \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        device const float* x [[buffer(2)]], device const float* add [[buffer(3)]],                            \
        device float* out [[buffer(4)]], device float* out1 [[buffer(5)]], device float* out2 [[buffer(6)]],   \
        device float* out3 [[buffer(7)]], WHERE)                                                               \
    {                                                                                                          \
        products_of<FORMAT>(slab, matrices, x, add, out, out1, out2, out3, group.y * SIMDS + simd, lane);           \
    }                                                                                                          \
    kernel void linear_many_##NAME(                                                                            \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        constant uint& tokens [[buffer(2)]], device const float* x [[buffer(3)]],                              \
        device float* out [[buffer(4)]], WHERE)                                                                \
    {                                                                                                          \
        products_of_many<FORMAT>(slab, matrices, tokens, x, out, group.x, group.y * SIMDS + simd, lane);            \
    }                                                                                                          \
    kernel void rows_##NAME(                                                                                   \
        device const uchar* slab [[buffer(0)]], constant Linear& matrices [[buffer(1)]],                       \
        device const int* ids [[buffer(2)]], device float* out [[buffer(3)]],                                  \
        uint2 at [[thread_position_in_grid]])                                                                  \
    {                                                                                                          \
        rows_of<FORMAT>(slab, matrices, ids, out, at.x, at.y);                                                    \
    }                                                                                                          \
    EXPERTS(_##NAME, FORMAT, 1)                                                                                \
    EXPERTS(_many_##NAME, FORMAT, TILE)                                                                        \
    kernel void experts_sum_##NAME(                                                                            \
        device const uchar* slab [[buffer(0)]], constant Layout& layout [[buffer(1)]],                         \
        constant Sum& sum [[buffer(2)]], device const Tile* tiles [[buffer(3)]],                               \
        device const float* weights [[buffer(4)]], device const float* hidden [[buffer(5)]],                   \
        device float* out [[buffer(6)]], WHERE)                                                                \
    {                                                                                                          \
        experts_sum<FORMAT>(                                                                                   \
            slab, layout, sum, tiles, weights, hidden, out, group.y * SIMDS + simd, lane);                     \
    }

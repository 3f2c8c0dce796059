// How matrices are stored: where their parts are, and what their values are made of.
#include "common.metal"

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr uint UNIT = 16; // values
constant constexpr uint NONE = 0xFFFFFFFF;

// How a matrix is stored (layouts.py). Offsets of its parts, from where it begins, in units of 16 bytes.
struct Layout {
    uint rows;
    uint width;
    uint weight;
    uint scales;
    uint biases; // of affine_dq, the blocks' numbers
    uint global_scale;
    uint add; // numbers that are added to the product, or NONE
    uint add_type;
    uint scale_type;
    uint scale_columns;
    uint shift;         // of affine and mxfp4 groups: 2^shift units each
    uint block_rows;    // rows that share scales, 0 for all
    uint block_columns; // of fp8, 0 for all
    uint first;         // the number of the first row in its block; of affine_dq, of the first group
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
    uint group; // of affine_dq: the number of the first one, counted from where a block begins
};

template <class Format> inline Row row_of(device const uchar* matrix, constant Layout& m, uint row)
{
    const bool twice = Format::TWICE;
    const uint scale_row = twice ? row : m.block_rows ? (row + m.first) / m.block_rows : 0;
    const ulong scales = ulong(scale_row) * (m.scale_columns * blocks::size_of(m.scale_type));
    Row found;
    found.weight = part_at(matrix, m.weight) + ulong(row) * Format::bytes(m.width);
    found.scales = part_at(matrix, m.scales) + scales;
    found.biases = part_at(matrix, m.biases) + (twice ? 0 : scales);
    found.global_scale = m.global_rule ? *(device const float*)part_at(matrix, m.global_scale) : 1.0f;
    found.group = row * m.scale_columns + m.first;
    return found;
}

// Formats. Value i of a unit is codes[i] * place(i) * FACTOR * scale, and bias if it is BIASED. RAGGED: the last unit
// of a row may have fewer values. `place` and FACTOR are powers of two, which spare a shift or a product for each code.
// TWICE: scales and biases are codes, too; the numbers they are made of belong to blocks that may begin within a row.

template <uint BITS> struct Affine {
    enum { BIASED = 1, RAGGED = 0, FACTOR = 1, TWICE = 0 };

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

template <uint BITS> struct AffineDq {
    enum { BIASED = 1, RAGGED = 0, FACTOR = 1, TWICE = 1 };

    static ulong bytes(uint width) { return Affine<BITS>::bytes(width); }

    static float place(uint i) { return Affine<BITS>::place(i); }

    static void codes(Row row, constant Layout& m, uint unit, thread float* values)
    {
        Affine<BITS>::codes(row, m, unit, values);
    }

    template <uint R>
    static void scales(
        thread const Row* rows, constant Layout& m, uint unit, thread float* scales, thread float* biases)
    {
        const uint group = unit >> m.shift;
        UNROLL for (uint r = 0; r < R; r++) {
            const uint code = rows[r].scales[group];
            const uint block = (rows[r].group + group) / blocks::DQ_GROUPS;
            device const uchar* own = rows[r].biases + block * blocks::DQ_BYTES;
            const float bias = number<blocks::BF16>(own, blocks::DQ_BIAS);
            // Both products are exact.
            scales[r] = number<blocks::BF16>(own, blocks::DQ_SCALE_STEP) * float(code & 15);
            biases[r] = fma(number<blocks::BF16>(own, blocks::DQ_BIAS_STEP), float(code >> 4), bias);
        }
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
    enum { BIASED = 0, RAGGED = 0, FACTOR = blocks::FP4_SCALE, TWICE = 0 };

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
    enum { BIASED = 0, RAGGED = 0, FACTOR = blocks::FP4_SCALE, TWICE = 0 };

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
    enum { BIASED = 0, RAGGED = 1, FACTOR = 1, TWICE = 0 };

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
    enum { BIASED = 0, RAGGED = 1, FACTOR = 1, TWICE = 0 };

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

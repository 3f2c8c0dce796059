/* What scales, biases and numbers of a matrix are as float32, and a token's activations as integers.
 *
 * Scales and biases are taken in strips of 16.
 */

namespace {

/* Of 64 codes. */
constexpr int unit_bytes(int format)
{
    return blocks::bytes_of(format == MXFP4 ? 4 : format, 64);
}

template <int TYPE> inline void widen_type(const uint8_t *source, int64_t first, int64_t count, float *out)
{
    source += first * (TYPE == FP_F32 ? 4 : 2);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        store8(out + i, widen8<TYPE>(source, i));
    if (i < count && count >= 8)
        store8(out + count - 8, widen8<TYPE>(source, count - 8));
    else
        for (; i < count; i++)
            out[i] = TYPE == FP_F32    ? ((const float *)source)[i]
                     : TYPE == FP_BF16 ? float_of((uint32_t)((const word16 *)source)[i] << 16)
                                       : half_to_float(((const word16 *)source)[i]);
}

/* `count` numbers at `source`, from number `first` on, as float32. */
inline void widen_numbers(const uint8_t *source, int type, int64_t first, int64_t count, float *out)
{
    if (type == FP_BF16)
        widen_type<FP_BF16>(source, first, count, out);
    else if (type == FP_F16)
        widen_type<FP_F16>(source, first, count, out);
    else
        widen_type<FP_F32>(source, first, count, out);
}

/* The values of a unit, followed by zeros if there are fewer than 64. */
inline const float *unit_values(const float *x, const Shape &s, int64_t unit, float *space)
{
    const int64_t left = s.width - 64 * unit;
    if (left >= 64)
        return x + 64 * unit;
    memset(space, 0, 64 * sizeof(float));
    memcpy(space, x + 64 * unit, left * sizeof(float));
    return space;
}

/* Activations as 16-bit integers, in a shape's order, with sums by group; returns what an integer is worth. `codes` and
 * `planes`: see Activations; null for what is not needed. */
float prepare(const float *x, const Shape &s, int16_t *codes, [[maybe_unused]] int8_t *planes, float *sums)
{
    bool finite = true;
    float largest = 0;
    alignas(64) float values[64];
    for (int64_t u = 0; u < s.units; u++) {
        const float size = largest64(unit_values(x, s, u, values), &finite);
        largest = size > largest ? size : largest;
    }
    /* All rounds to zero where there are only zeros, or what is as good as that. */
    const float inverse = (float)MOST_ACTIVATION / largest;
    const bool usable = finite && inverse < INFINITY;
    for (int64_t g = 0; g < (s.groups + 15) / 16 * 16; g++)
        sums[g] = 0;
    for (int64_t u = 0; u < s.units; u++) {
        alignas(64) int16_t straight[64];
        int32_t half_sums[2];
        round64(unit_values(x, s, u, values), usable ? inverse : 0, straight, half_sums);
        if (codes)
            reorder(s.order, straight, codes + 64 * u);
#if defined(FP_PLANES)
        if (planes)
            reorder_planes(s.order, straight, planes + 128 * u);
#endif
        if (s.group == 32) {
            sums[2 * u] = (float)half_sums[0];
            if (2 * u + 1 < s.groups)
                sums[2 * u + 1] = (float)half_sums[1];
        } else {
            sums[64 * u / s.group] += (float)(half_sums[0] + half_sums[1]);
        }
    }
    return finite ? (usable ? largest / (float)MOST_ACTIVATION : 0) : NAN;
}

/* Groups before a unit. */
inline int64_t groups_before(const Shape &s, int64_t unit)
{
    const int64_t groups = 64 * unit / s.group;
    return groups < s.groups ? groups : s.groups;
}

template <int FORMAT> inline const uint8_t *padded(const uint8_t *unit, int64_t codes, uint8_t *space)
{
    memset(space, 0, 96);
    memcpy(space, unit, codes * unit_bytes(FORMAT) / 64);
    return space;
}

/* Units of a row before those that must be copied: one that is incomplete, and, where unpacking reads 16 bytes for a few
 * codes, those less than that before the row's end. */
template <int FORMAT> inline int64_t uncopied(const Shape &s)
{
    const bool odd = FORMAT == 3 || FORMAT == 5 || FORMAT == 6;
    const int64_t count = s.units - (s.width % 64 ? 1 : 0) - (odd ? 1 : 0);
    return count > 0 ? count : 0;
}

/* Bytes of a scale; of a bias, too, but for affine_dq, whose biases are made of the same byte. */
inline int64_t number_bytes(int kind, int type)
{
    return kind == FP_MXFP4 || type == FP_NIBBLES ? 1 : type == FP_F32 ? 4 : 2;
}

/* Where biases come from: the numbers themselves, or the block's of affine_dq. */
inline const uint8_t *bias_source(const fp_matrix &m, int type, int64_t first)
{
    return m.biases +
           (type == FP_NIBBLES ? first / blocks::DQ_GROUPS * blocks::DQ_BYTES : first * number_bytes(FP_AFFINE, type));
}

inline float dq_number(const fp_matrix &m, int64_t group, blocks::DqNumber which)
{
    uint16_t number;
    memcpy(&number, m.biases + group / blocks::DQ_GROUPS * blocks::DQ_BYTES + 2 * which, 2);
    return float_of((uint32_t)number << 16);
}

/* Scales of affine_dq, or biases, of the eight groups of a block from group `first` on; products of codes are exact. */
template <bool BIASES> inline Floats dq_block(const fp_matrix &m, int64_t first)
{
    const Floats codes = nibbles8<BIASES ? 4 : 0>(m.scales + first);
    if (BIASES)
        return mul_add8(
            all8(dq_number(m, first, blocks::DQ_BIAS)), codes, all8(dq_number(m, first, blocks::DQ_BIAS_STEP)));
    return mul_add8(none8(), codes, all8(dq_number(m, first, blocks::DQ_SCALE_STEP)));
}

/* The same of `count` groups that need not be whole blocks, then zeros. */
template <bool BIASES> inline Strip dq_strip(const fp_matrix &m, int64_t first, int64_t count)
{
    if (first % blocks::DQ_GROUPS == 0 && count == 16)
        return strip_of(dq_block<BIASES>(m, first), dq_block<BIASES>(m, first + 8));
    if (first % blocks::DQ_GROUPS == 0 && count == 8)
        return strip_of(dq_block<BIASES>(m, first), none8());
    alignas(64) float numbers[16] = {0};
    for (int64_t i = 0; i < count; i++) {
        const uint8_t code = m.scales[first + i];
        numbers[i] = BIASES ? dq_number(m, first + i, blocks::DQ_BIAS) +
                                  dq_number(m, first + i, blocks::DQ_BIAS_STEP) * (float)(code >> 4)
                            : dq_number(m, first + i, blocks::DQ_SCALE_STEP) * (float)(code & 15);
    }
    return load_strip(numbers);
}

/* Scales or biases of a strip: `count` numbers of a matrix of `all`, from number `first` on, then zeros. */
FP_INLINE Strip numbers_of(const uint8_t *source, int type, int64_t first, int64_t count, int64_t all)
{
    switch (type) {
    case FP_BF16:
        return widen_strip<FP_BF16>(source, first, count, all);
    case FP_F16:
        return widen_strip<FP_F16>(source, first, count, all);
    default:
        return widen_strip<FP_F32>(source, first, count, all);
    }
}

template <int FORMAT, int GROUP>
FP_INLINE Strip scales_of(const fp_matrix &m, int type, int64_t first, int64_t count, int64_t all)
{
    if (FORMAT != MXFP4)
        return GROUP == blocks::DQ_GROUP && type == FP_NIBBLES ? dq_strip<false>(m, first, count)
                                                               : numbers_of(m.scales, type, first, count, all);
    return powers_of_two(m.scales + first, count, 0.5f); /* codes are twice the values */
}

template <int GROUP>
FP_INLINE Strip biases_of(const fp_matrix &m, int type, int64_t first, int64_t count, int64_t all)
{
    return GROUP == blocks::DQ_GROUP && type == FP_NIBBLES ? dq_strip<true>(m, first, count)
                                                           : numbers_of(m.biases, type, first, count, all);
}

/* Asks for a matrix's scales and biases from number `first` on. */
inline void prefetch_numbers(const fp_matrix &m, int64_t first)
{
    prefetch(m.scales + first * number_bytes(m.kind, m.scale_type));
    if (m.biases)
        prefetch(bias_source(m, m.scale_type, first));
}

} // namespace

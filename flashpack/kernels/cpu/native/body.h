/* The products, once for each instruction set: a level_*.cpp defines the primitives below and includes this.
 *
 * A row of weights is taken in units of 64 codes (an incomplete one is padded with zeros). Inside a unit, codes lie in
 * four vectors j of two halves of eight: the position of a code is 16 j + 8 half + k, and `local_code` says which of the
 * half's 32 codes that is. Activations are put in the same order, so that unpacking needs no shuffles across a vector.
 *
 * For each row and token the operations and their order are the same whatever is computed beside it: results depend
 * neither on how rows are cut nor on how many tokens come together.
 *
 * Primitives: Codes, unpack<FORMAT>(bytes), load_codes(int16), store_codes; Lanes (float32, some for each half of a
 * unit), none(), dot(Codes, int16 activations) -> Lanes, mul_add(sum, Lanes, factor<SPLIT>(scales, unit)),
 * total(Lanes); Floats (eight float32), load8, mul_add8, total8; prefetch.
 */

namespace {

inline int local_code(int order, int j, int k)
{
    return order == ORDER_NIBBLES ? 4 * k + j : order == ORDER_PAIRS ? 8 * (k % 4) + 4 * (k / 4) + j : 8 * j + k;
}

constexpr int unit_bytes(int format)
{
    return format == MXFP4 ? 32 : 8 * format;
}

inline float float_of(uint32_t word)
{
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline float half_to_float(uint16_t half)
{
    uint32_t exponent = half & 0x7C00, sign = (uint32_t)(half & 0x8000) << 16;
    float size = float_of((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f; /* exact, for subnormal numbers too */
    uint32_t word;
    memcpy(&word, &size, 4);
    return float_of((exponent == 0x7C00 ? word | 0x7F800000 : word) | sign);
}

typedef uint16_t __attribute__((may_alias)) word16;

/* `count` numbers at `source`, from number `first` on, as float32. */
inline void widen_numbers(
    const uint8_t *__restrict source, int type, int64_t first, int64_t count, float *__restrict out)
{
    const word16 *words = (const word16 *)source + first;
    if (type == FP_F32)
        memcpy(out, source + 4 * first, 4 * count);
    else if (type == FP_BF16)
        for (int64_t i = 0; i < count; i++)
            out[i] = float_of((uint32_t)words[i] << 16);
    else
        for (int64_t i = 0; i < count; i++)
            out[i] = half_to_float(words[i]);
}

/* 2^(code - 127); 255 is NaN. */
inline float power_of_two(uint8_t code)
{
    return code == 255 ? NAN : float_of(code ? (uint32_t)code << 23 : 0x00400000);
}

inline void row_scales(const fp_matrix &m, int64_t row, int64_t groups, int64_t first, int64_t count, float *out)
{
    if (m.kind == FP_MXFP4) {
        const uint8_t *codes = m.scales + row * groups + first;
        for (int64_t i = 0; i < count; i++)
            out[i] = 0.5f * power_of_two(codes[i]); /* codes are twice the values */
    } else {
        widen_numbers(m.scales, m.scale_type, row * groups + first, count, out);
    }
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

/* Activations as 16-bit integers, in a shape's order, with sums by group; returns what an integer is worth. */
float prepare(const float *x, const Shape &s, int16_t *codes, float *sums)
{
    bool finite = true;
    float largest = 0;
    alignas(64) float values[64];
    for (int64_t u = 0; u < s.units; u++) {
        const float size = largest64(unit_values(x, s, u, values), &finite);
        largest = size > largest ? size : largest;
    }
    /* All rounds to zero where there are only zeros, or what is as good as that. */
    const float inverse = 32767.0f / largest;
    const bool usable = finite && inverse < INFINITY;
    for (int64_t g = 0; g < (s.groups + 7) / 8 * 8; g++)
        sums[g] = 0;
    for (int64_t u = 0; u < s.units; u++) {
        alignas(64) int16_t straight[64];
        int32_t half_sums[2];
        round64(unit_values(x, s, u, values), usable ? inverse : 0, straight, half_sums);
        reorder(s.order, straight, codes + 64 * u);
        if (s.group == 32) {
            sums[2 * u] = (float)half_sums[0];
            if (2 * u + 1 < s.groups)
                sums[2 * u + 1] = (float)half_sums[1];
        } else {
            sums[64 * u / s.group] += (float)(half_sums[0] + half_sums[1]);
        }
    }
    return finite ? (usable ? largest / 32767.0f : 0) : NAN;
}

/* Scales of a segment's units as products use them: one for each half if SPLIT (groups of 32), else for each unit. */
template <bool SPLIT>
inline void segment_scales(
    const fp_matrix &m, const Shape &s, int64_t row, int64_t unit, int64_t units, float *out)
{
    if (SPLIT) {
        int64_t last = 2 * (unit + units) < s.groups ? 2 * (unit + units) : s.groups;
        row_scales(m, row, s.groups, 2 * unit, last - 2 * unit, out);
        if (last < 2 * (unit + units))
            out[2 * units - 1] = 0;
    } else if (s.group == 64) {
        row_scales(m, row, s.groups, unit, units, out);
    } else {
        float wide[LONG_SEGMENT / 2 + 1];
        row_scales(m, row, s.groups, unit / 2, (units + 1) / 2, wide);
        for (int64_t u = 0; u < units; u++)
            out[u] = wide[u / 2];
    }
}

inline void prefetch_scales(const fp_matrix &m, int64_t group)
{
    const int64_t size = m.kind == FP_MXFP4 ? 1 : m.scale_type == FP_F32 ? 4 : 2;
    prefetch(m.scales + group * size + SCALES_AHEAD);
    if (m.biases)
        prefetch(m.biases + group * size + SCALES_AHEAD);
}

/* Adds the part of a segment's biases to the sum of a row's product; `biases` of `count` groups, then zeros. */
inline Floats add_biases(Floats sum, const float *biases, const float *sums, int64_t count)
{
    for (int64_t g = 0; g < count; g += 8)
        sum = mul_add8(sum, load8(biases + g), load8(sums + g));
    return sum;
}

/* A segment's biases, padded with zeros to a multiple of eight; returns how many there are with them. */
inline int64_t segment_biases(const fp_matrix &m, const Shape &s, int64_t row, int64_t first, int64_t last, float *out)
{
    const int64_t count = last - first, all = (count + 7) / 8 * 8;
    widen_numbers(m.biases, m.scale_type, row * s.groups + first, count, out);
    for (int64_t g = count; g < all; g++)
        out[g] = 0;
    return all;
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

/* R rows times one token over complete units, with the scales of each unit or half. */
template <int FORMAT, bool SPLIT, int R>
inline void units_of_one(
    const uint8_t *weights, int64_t pitch, int64_t units, const int16_t *activations,
    const float (*scales)[2 * LONG_SEGMENT], Lanes *sums)
{
    Lanes own[R];
    for (int r = 0; r < R; r++)
        own[r] = sums[r];
    for (int64_t u = 0; u < units; u++) {
        const uint8_t *unit = weights + u * unit_bytes(FORMAT);
        if (unit_bytes(FORMAT) > 32 || u % (64 / unit_bytes(FORMAT)) == 0)
            for (int r = 0; r < R; r++)
                prefetch(unit + r * pitch + AHEAD);
        for (int r = 0; r < R; r++) {
            const Lanes products = dot(unpack<FORMAT>(unit + r * pitch), activations + 64 * u);
            own[r] = mul_add(own[r], products, factor<SPLIT>(scales[r], u));
        }
    }
    for (int r = 0; r < R; r++)
        sums[r] = own[r];
}

/* R rows times one token. */
template <int FORMAT, bool SPLIT, int R>
inline void rows_of_one(const fp_matrix &m, const Shape &s, int64_t row, const Activations &a, float *out)
{
    const int64_t pitch = m.width * unit_bytes(FORMAT) / 64;
    const uint8_t *weights = m.weight + row * pitch;
    const int64_t complete = uncopied<FORMAT>(s);
    Lanes sums[R];
    Floats constant[R];
    for (int r = 0; r < R; r++) {
        sums[r] = none();
        constant[r] = none8();
    }
    for (int64_t begin = 0; begin < s.units; begin += LONG_SEGMENT) {
        const int64_t end = begin + LONG_SEGMENT < s.units ? begin + LONG_SEGMENT : s.units;
        const int64_t whole = complete < end ? complete : end;
        const int64_t group = groups_before(s, begin), last = groups_before(s, end);
        alignas(64) float scales[R][2 * LONG_SEGMENT];
        for (int r = 0; r < R; r++) {
            prefetch_scales(m, (row + r) * s.groups + group);
            segment_scales<SPLIT>(m, s, row + r, begin, end - begin, scales[r]);
            if (m.biases) {
                float biases[2 * LONG_SEGMENT];
                const int64_t all = segment_biases(m, s, row + r, group, last, biases);
                constant[r] = add_biases(constant[r], biases, a.sums + group, all);
            }
        }
        units_of_one<FORMAT, SPLIT, R>(
            weights + begin * unit_bytes(FORMAT), pitch, whole - begin, a.codes + 64 * begin, scales, sums);
        for (int64_t u = whole > begin ? whole : begin; u < end; u++)
            for (int r = 0; r < R; r++) {
                uint8_t space[96];
                const uint8_t *unit = weights + r * pitch + u * unit_bytes(FORMAT);
                const int64_t left = s.width - 64 * u;
                const Codes codes = unpack<FORMAT>(padded<FORMAT>(unit, left < 64 ? left : 64, space));
                sums[r] = mul_add(sums[r], dot(codes, a.codes + 64 * u), factor<SPLIT>(scales[r], u - begin));
            }
    }
    for (int r = 0; r < R; r++)
        out[r] = (total(sums[r]) + total8(constant[r])) * a.scale;
}

/* R rows, unpacked, times T tokens, over the units of a segment. */
template <bool SPLIT, int R, int T>
inline void tile(
    const int16_t (*codes)[64 * SEGMENT], const float (*scales)[2 * SEGMENT], int64_t begin, int64_t end,
    const Activations *tokens, int first, Lanes (*sums)[TOKENS])
{
    tokens += first;
    Lanes own[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            own[r][t] = sums[r][first + t];
    for (int64_t u = begin; u < end; u++) {
        Sums products[R][T];
        dots<R, T>(codes, tokens, u - begin, u, products);
        for (int r = 0; r < R; r++) {
            const Lanes scale = factor<SPLIT>(scales[r], u - begin);
            for (int t = 0; t < T; t++)
                own[r][t] = mul_add(own[r][t], converted(products[r][t]), scale);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            sums[r][first + t] = own[r][t];
}

/* Up to ROWS rows times up to TOKENS tokens. */
template <int FORMAT, bool SPLIT>
void rows_of_many(
    const fp_matrix &m, const Shape &s, int64_t row, int rows, const Activations *tokens, int count, float *out,
    int64_t stride)
{
    alignas(64) int16_t codes[ROWS][64 * SEGMENT];
    alignas(64) float scales[ROWS][2 * SEGMENT];
    alignas(64) Lanes sums[ROWS][TOKENS];
    alignas(64) Floats constant[ROWS][TOKENS];
    const int64_t pitch = m.width * unit_bytes(FORMAT) / 64;
    const int64_t complete = uncopied<FORMAT>(s);
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < count; t++) {
            sums[r][t] = none();
            constant[r][t] = none8();
        }
    for (int64_t begin = 0; begin < s.units; begin += SEGMENT) {
        const int64_t end = begin + SEGMENT < s.units ? begin + SEGMENT : s.units;
        const int64_t group = groups_before(s, begin), last = groups_before(s, end);
        for (int r = 0; r < rows; r++) {
            segment_scales<SPLIT>(m, s, row + r, begin, end - begin, scales[r]);
            if (m.biases) {
                float biases[2 * SEGMENT];
                const int64_t all = segment_biases(m, s, row + r, group, last, biases);
                for (int t = 0; t < count; t++)
                    constant[r][t] = add_biases(constant[r][t], biases, tokens[t].sums + group, all);
            }
            for (int64_t u = begin; u < end; u++) {
                const uint8_t *unit = m.weight + (row + r) * pitch + u * unit_bytes(FORMAT);
                uint8_t space[96];
                int64_t left = s.width - 64 * u;
                if (u >= complete)
                    unit = padded<FORMAT>(unit, left < 64 ? left : 64, space);
                store_codes(codes[r] + 64 * (u - begin), unpack<FORMAT>(unit));
            }
        }
        int r = 0;
        for (; r + 2 <= rows; r += 2) {
            int t = 0;
            for (; t + 3 <= count && count - t != 4; t += 3)
                tile<SPLIT, 2, 3>(codes + r, scales + r, begin, end, tokens, t, sums + r);
            for (; t + 2 <= count; t += 2)
                tile<SPLIT, 2, 2>(codes + r, scales + r, begin, end, tokens, t, sums + r);
            for (; t < count; t++)
                tile<SPLIT, 2, 1>(codes + r, scales + r, begin, end, tokens, t, sums + r);
        }
        for (; r < rows; r++)
            for (int t = 0; t < count; t++)
                tile<SPLIT, 1, 1>(codes + r, scales + r, begin, end, tokens, t, sums + r);
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < rows; r++)
            out[t * stride + r] = (total(sums[r][t]) + total8(constant[r][t])) * tokens[t].scale;
}

/* Rows stored as numbers, in blocks of eight values that go to two sums in turn. R rows times T tokens. */
template <int R, int T>
inline void plain_tile(
    const float (*weights)[64 * SEGMENT], const Activations *tokens, int first, int64_t begin, int64_t end,
    Floats (*sums)[TOKENS][2])
{
    Floats own[R][T][2];
    tokens += first;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++)
                own[r][t][i] = sums[r][first + t][i];
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
        for (int side = 0; side < 2; side++)
            for (int r = 0; r < R; r++) {
                Floats w = load8(weights[r] + i - begin + 8 * side);
                for (int t = 0; t < T; t++)
                    own[r][t][side] = mul_add8(own[r][t][side], w, load8(tokens[t].values + i + 8 * side));
            }
    for (; i < end; i += 8)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) {
                alignas(32) float w[8] = {0}, x[8] = {0};
                int64_t count = end - i < 8 ? end - i : 8;
                memcpy(w, weights[r] + i - begin, count * sizeof(float));
                memcpy(x, tokens[t].values + i, count * sizeof(float));
                own[r][t][0] = mul_add8(own[r][t][0], load8(w), load8(x));
            }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++)
                sums[r][first + t][i] = own[r][t][i];
}

void plain_rows(
    const fp_matrix &m, int64_t row, int rows, const Activations *tokens, int count, float *out, int64_t stride)
{
    alignas(64) float wide[ROWS][64 * SEGMENT];
    alignas(64) Floats sums[ROWS][TOKENS][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < count; t++)
            sums[r][t][0] = sums[r][t][1] = none8();
    const int64_t bytes = m.kind == FP_F32 ? 4 : 2;
    for (int64_t begin = 0; begin < m.width; begin += 64 * SEGMENT) {
        const int64_t end = begin + 64 * SEGMENT < m.width ? begin + 64 * SEGMENT : m.width;
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * m.width + begin;
            for (int64_t i = 0; i < (end - begin) * bytes; i += 64)
                prefetch(m.weight + at * bytes + i + AHEAD);
            widen_numbers(m.weight, m.kind, at, end - begin, wide[r]);
        }
        int r = 0;
        for (; r + 4 <= rows; r += 4) {
            int t = 0;
            for (; t + 1 < count && count > 1; t += 2) {
                plain_tile<2, 2>(wide + r, tokens, t, begin, end, sums + r);
                plain_tile<2, 2>(wide + r + 2, tokens, t, begin, end, sums + r + 2);
            }
            for (; t < count; t++)
                plain_tile<4, 1>(wide + r, tokens, t, begin, end, sums + r);
        }
        for (; r < rows; r++)
            for (int t = 0; t < count; t++)
                plain_tile<1, 1>(wide + r, tokens, t, begin, end, sums + r);
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < rows; r++)
            out[t * stride + r] = total8(add8(sums[r][t][0], sums[r][t][1]));
}

template <int FORMAT, bool SPLIT>
void packed_product(
    const fp_matrix &m, const Shape &s, int64_t first, int64_t last, const Activations *tokens, int64_t count,
    float *out, int64_t stride)
{
    if (count == 1) {
        int64_t row = first;
        for (; row + 4 <= last; row += 4)
            rows_of_one<FORMAT, SPLIT, 4>(m, s, row, *tokens, out + row - first);
        for (; row < last; row++)
            rows_of_one<FORMAT, SPLIT, 1>(m, s, row, *tokens, out + row - first);
        return;
    }
    for (int64_t t = 0; t < count; t += TOKENS)
        for (int64_t row = first; row < last; row += ROWS)
            rows_of_many<FORMAT, SPLIT>(
                m, s, row, last - row < ROWS ? (int)(last - row) : ROWS, tokens + t,
                count - t < TOKENS ? (int)(count - t) : TOKENS, out + t * stride + row - first, stride);
}

void product(
    const fp_matrix &m, const Shape &s, int64_t first, int64_t last, const Activations *tokens, int64_t count,
    float *out, int64_t stride)
{
    typedef void (*Product)(
        const fp_matrix &, const Shape &, int64_t, int64_t, const Activations *, int64_t, float *, int64_t);
    static const Product packed[9][2] = {
        {packed_product<MXFP4, false>, packed_product<MXFP4, true>},
        {0, 0},
        {packed_product<2, false>, packed_product<2, true>},
        {packed_product<3, false>, packed_product<3, true>},
        {packed_product<4, false>, packed_product<4, true>},
        {packed_product<5, false>, packed_product<5, true>},
        {packed_product<6, false>, packed_product<6, true>},
        {0, 0},
        {packed_product<8, false>, packed_product<8, true>},
    };
    if (m.kind == FP_AFFINE || m.kind == FP_MXFP4) {
        packed[m.kind == FP_MXFP4 ? MXFP4 : m.bits][s.group == 32](m, s, first, last, tokens, count, out, stride);
    } else {
        for (int64_t t = 0; t < count; t += TOKENS)
            for (int64_t row = first; row < last; row += ROWS)
                plain_rows(
                    m, row, last - row < ROWS ? (int)(last - row) : ROWS, tokens + t,
                    count - t < TOKENS ? (int)(count - t) : TOKENS, out + t * stride + row - first, stride);
    }
    for (int64_t row = first; m.add && row < last; row++) {
        float bias;
        widen_numbers(m.add, m.add_type, row, 1, &bias);
        for (int64_t t = 0; t < count; t++)
            out[t * stride + row - first] += bias;
    }
}

/* exp for activations: 2^n times a polynomial; a relative error of about 1e-7. */
inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = round_even(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * float_of((uint32_t)((int32_t)n + 127) << 23);
}

inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

void activate(int function, float limit, const float *gate, const float *up, float *out, int64_t count)
{
    switch (function) {
    case FP_SILU:
        for (int64_t i = 0; i < count; i++)
            out[i] = gate[i] * sigmoid(gate[i]);
        break;
    case FP_GELU:
        for (int64_t i = 0; i < count; i++)
            out[i] = gate[i] * 0.5f * (1.0f + erff(gate[i] * 0.70710678f));
        break;
    case FP_GELU_TANH: /* 0.5 (1 + tanh y) = sigmoid(2 y) */
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i];
            out[i] = x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        }
        break;
    case FP_RELU2:
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i] < 0 ? 0 : gate[i];
            out[i] = x * x;
        }
        break;
    case FP_SWIGLU_OAI:
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i] > limit ? limit : gate[i];
            float y = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            out[i] = x * sigmoid(1.702f * x) * (y + 1.0f);
        }
        return;
    }
    if (up)
        for (int64_t i = 0; i < count; i++)
            out[i] *= up[i];
}

} // namespace

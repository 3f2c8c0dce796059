/* The kernels in plain C++: correct on any processor. */
#include "level.h"

namespace {

enum { BLOCK = 4, MOST_WEIGHT = 4095, TILE_ROWS = 1, TILE_TOKENS = 1 };

struct Codes {
    int16_t part[64];
};

struct Sums {
    int64_t half[2];
};

struct Lanes {
    float half[2];
};

struct Floats {
    float lane[8];
};

inline void prefetch(const void *address)
{
#if defined(__GNUC__)
    __builtin_prefetch(address, 0, 2);
#endif
}

template <int FORMAT> inline Codes unpack(const uint8_t *unit)
{
    static constexpr int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    static_assert(are_twice_fp4(twice), "blocks.h");
    Codes codes;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 32; i++) {
            const int bits = FORMAT == MXFP4 ? 4 : FORMAT, at = (32 * half + i) * bits;
            uint32_t word = unit[at / 8];
            if (at % 8 + bits > 8)
                word |= (uint32_t)unit[at / 8 + 1] << 8;
            word = word >> at % 8 & ((1u << bits) - 1);
            codes.part[16 * (i / 8) + 8 * half + i % 8] = (int16_t)(FORMAT == MXFP4 ? twice[word & 15] : (int)word);
        }
    return codes;
}

template <int SHIFT>
inline void store_weights(int16_t *out, const Codes &codes, const int16_t *scales, const int16_t *biases)
{
    for (int i = 0; i < 64; i++) {
        const int half = i / 8 % 2;
        out[i] = (int16_t)(((codes.part[i] * (1 << SHIFT) * scales[half] + (1 << 14)) >> 15) + biases[half]);
    }
}

inline Sums products(const int16_t *a, const int16_t *b)
{
    Sums sums = {{0, 0}};
    for (int j = 0; j < 4; j++)
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 8; k++)
                sums.half[half] += (int32_t)a[16 * j + 8 * half + k] * b[16 * j + 8 * half + k];
    return sums;
}

inline Lanes converted(Sums sums)
{
    return {{(float)sums.half[0], (float)sums.half[1]}};
}

inline Lanes dot(const Codes &codes, const int16_t *activations)
{
    return converted(products(codes.part, activations));
}

template <int R, int T>
inline void dots(
    const int16_t (*rows)[ROW_PITCH], const Activations *tokens, int64_t own, int64_t unit, int64_t count,
    Sums (*sums)[T])
{
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            sums[r][t] = {{0, 0}};
            for (int64_t i = 0; i < 64 * count; i += 64) {
                const Sums own_sums = products(rows[r] + 64 * own + i, tokens[t].codes + 64 * unit + i);
                for (int half = 0; half < 2; half++)
                    sums[r][t].half[half] += own_sums.half[half];
            }
        }
}

inline Lanes none()
{
    return {{0, 0}};
}

inline Lanes mul_add(Lanes sum, Lanes a, Lanes b)
{
    return {{sum.half[0] + a.half[0] * b.half[0], sum.half[1] + a.half[1] * b.half[1]}};
}

template <bool SPLIT> inline Lanes factor(const float *factors, int64_t unit)
{
    if (SPLIT)
        return {{factors[2 * unit], factors[2 * unit + 1]}};
    return {{factors[unit], factors[unit]}};
}

inline float total(Lanes sum)
{
    return sum.half[0] + sum.half[1];
}

inline Floats none8()
{
    return {{0}};
}

inline Floats all8(float value)
{
    return {{value, value, value, value, value, value, value, value}};
}

inline Floats load8(const float *source)
{
    Floats out;
    memcpy(out.lane, source, sizeof out.lane);
    return out;
}

inline void store8(float *out, Floats values)
{
    memcpy(out, values.lane, sizeof values.lane);
}

/* Half of each of eight bytes, the low one (SHIFT 0) or the high one (4), as numbers. */
template <int SHIFT> inline Floats nibbles8(const uint8_t *source)
{
    float out[8];
    for (int i = 0; i < 8; i++)
        out[i] = (float)(source[i] >> SHIFT & 15);
    return load8(out);
}

template <int TYPE> inline Floats widen8(const uint8_t *source, int64_t first)
{
    Floats out;
    for (int i = 0; i < 8; i++) {
        uint32_t word = 0;
        memcpy(&word, source + (first + i) * (TYPE == FP_F32 ? 4 : 2), TYPE == FP_F32 ? 4 : 2);
        out.lane[i] = TYPE == FP_F32 ? float_of(word) : TYPE == FP_BF16 ? float_of(word << 16) : half_to_float((uint16_t)word);
    }
    return out;
}

inline Floats add8(Floats a, Floats b)
{
    for (int i = 0; i < 8; i++)
        a.lane[i] += b.lane[i];
    return a;
}

inline Floats mul_add8(Floats sum, Floats a, Floats b)
{
    for (int i = 0; i < 8; i++)
        sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
}

inline float total8(Floats sum)
{
    float four[4];
    for (int i = 0; i < 4; i++)
        four[i] = sum.lane[i] + sum.lane[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

struct Strip {
    float value[16];
};

inline Strip load_strip(const float *source)
{
    Strip strip;
    memcpy(strip.value, source, sizeof strip.value);
    return strip;
}

inline Strip strip_of(Floats low, Floats high)
{
    Strip strip;
    store8(strip.value, low);
    store8(strip.value + 8, high);
    return strip;
}

inline void store_strip(float *out, Strip strip)
{
    memcpy(out, strip.value, sizeof strip.value);
}

template <int TYPE> inline Strip widen_strip(const uint8_t *source, int64_t first, int64_t count, int64_t)
{
    Strip strip = {{0}};
    for (int64_t i = 0; i < count; i++) {
        uint32_t word = 0;
        memcpy(&word, source + (first + i) * (TYPE == FP_F32 ? 4 : 2), TYPE == FP_F32 ? 4 : 2);
        strip.value[i] = TYPE == FP_F32 ? float_of(word) : TYPE == FP_BF16 ? float_of(word << 16) : half_to_float((uint16_t)word);
    }
    return strip;
}

inline Lanes add_strip(Lanes sum, Strip a, Strip b)
{
    for (int i = 0; i < 16; i++)
        sum.half[i / 8] += a.value[i] * b.value[i];
    return sum;
}

inline float largest64(const float *values, bool *finite)
{
    float largest = 0, poison = 0; /* NaN where a value is infinite or NaN */
    for (int i = 0; i < 64; i++) {
        const float size = fabsf(values[i]);
        largest = size > largest ? size : largest;
        poison += values[i] * 0.0f;
    }
    *finite = *finite && poison == 0;
    return largest;
}

inline void round64(const float *values, float factor, int16_t *out, int32_t *half_sums)
{
    for (int half = 0; half < 2; half++) {
        half_sums[half] = 0;
        for (int i = 32 * half; i < 32 * half + 32; i++) {
            out[i] = (int16_t)rintf(values[i] * factor);
            half_sums[half] += out[i];
        }
    }
}

/* Straight: unpacking goes code by code anyway. */
inline void reorder(int, const int16_t *in, int16_t *out)
{
    for (int i = 0; i < 64; i++)
        out[16 * (i % 32 / 8) + 8 * (i / 32) + i % 8] = in[i];
}

} // namespace
#include "strips.h"
#include "body.h"
#include "decode.h"
#include "recurrent.h"

const Level level_portable = {"portable", false, prepare, nullptr, product, activate, normalize, attend, convolve, delta};

/* The kernels for 64-bit ARM, with NEON, which every such processor has. */
#include "level.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace {

/* Units whose products are summed as integers, 32 in each sum. */
enum { BLOCK = 4, MOST_WEIGHT = 4095, TILE_ROWS = 2, TILE_TOKENS = 2 };

struct Codes {
    int16x8_t part[4][2];
};

struct Sums {
    int32x4_t half[2];
};

struct Lanes {
    float32x4_t half[2];
};

typedef Lanes Floats;

inline void prefetch(const void *address)
{
    __builtin_prefetch(address, 0, 2);
}

/* Codes of 3, 5 or 6 bits: two bytes hold one; a shift to the left moves it to the top of its word. */
template <int BITS> inline int16x8_t unpack_eight(const uint8_t *chunk)
{
    uint8_t order[16];
    int16_t shifts[8];
    for (int i = 0; i < 8; i++) {
        order[2 * i] = (uint8_t)(i * BITS / 8);
        order[2 * i + 1] = (uint8_t)(i * BITS / 8 + 1);
        shifts[i] = (int16_t)(16 - BITS - i * BITS % 8);
    }
    const uint8x16_t bytes = vcombine_u8(vld1_u8(chunk), vdup_n_u8(0));
    const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(order)));
    return vreinterpretq_s16_u16(vshrq_n_u16(vshlq_u16(words, vld1q_s16(shifts)), 16 - BITS));
}

template <int FORMAT> inline Codes unpack(const uint8_t *unit)
{
    Codes codes;
    for (int half = 0; half < 2; half++) {
        if (FORMAT == 4) {
            const uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(unit + 16 * half)), mask = vdupq_n_u16(15);
            codes.part[0][half] = vreinterpretq_s16_u16(vandq_u16(words, mask));
            codes.part[1][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(words, 4), mask));
            codes.part[2][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(words, 8), mask));
            codes.part[3][half] = vreinterpretq_s16_u16(vshrq_n_u16(words, 12));
        } else if (FORMAT == MXFP4) {
            static constexpr int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
            static_assert(are_twice_fp4(twice), "blocks.h");
            const int8x16_t table = vld1q_s8(twice);
            const uint8x16_t bytes = vld1q_u8(unit + 16 * half);
            const int16x8_t even = vreinterpretq_s16_s8(vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))));
            const int16x8_t odd = vreinterpretq_s16_s8(vqtbl1q_s8(table, vshrq_n_u8(bytes, 4)));
            codes.part[0][half] = vshrq_n_s16(vshlq_n_s16(even, 8), 8);
            codes.part[1][half] = vshrq_n_s16(vshlq_n_s16(odd, 8), 8);
            codes.part[2][half] = vshrq_n_s16(even, 8);
            codes.part[3][half] = vshrq_n_s16(odd, 8);
        } else if (FORMAT == 2) {
            /* Four words of eight codes: codes 0 to 3 of each, then codes 4 to 7. */
            const uint16x4_t words = vreinterpret_u16_u8(vld1_u8(unit + 8 * half));
            const uint16x8_t both = vcombine_u16(words, vshr_n_u16(words, 8)), mask = vdupq_n_u16(3);
            codes.part[0][half] = vreinterpretq_s16_u16(vandq_u16(both, mask));
            codes.part[1][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(both, 2), mask));
            codes.part[2][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(both, 4), mask));
            codes.part[3][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(both, 6), mask));
        } else if (FORMAT == 8) {
            for (int j = 0; j < 4; j++)
                codes.part[j][half] = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(unit + 32 * half + 8 * j)));
        } else {
            for (int j = 0; j < 4; j++)
                codes.part[j][half] = unpack_eight<FORMAT == 3 || FORMAT == 5 ? FORMAT : 6>(unit + (4 * half + j) * FORMAT);
        }
    }
    return codes;
}

/* Weights from codes: see block_scales in many.h. */
template <int SHIFT>
inline void store_weights(int16_t *out, const Codes &codes, const int16_t *scales, const int16_t *biases)
{
    for (int j = 0; j < 4; j++)
        for (int half = 0; half < 2; half++) {
            const int16x8_t product = vqrdmulhq_n_s16(vshlq_n_s16(codes.part[j][half], SHIFT), scales[half]);
            vst1q_s16(out + 16 * j + 8 * half, vaddq_s16(product, vdupq_n_s16(biases[half])));
        }
}

inline int32x4_t add_products(int32x4_t sum, int16x8_t a, int16x8_t b)
{
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

inline Lanes converted(Sums sums)
{
    return {{vcvtq_f32_s32(sums.half[0]), vcvtq_f32_s32(sums.half[1])}};
}

inline Lanes dot(const Codes &codes, const int16_t *activations)
{
    Sums sums = {{vdupq_n_s32(0), vdupq_n_s32(0)}};
    for (int j = 0; j < 4; j++)
        for (int half = 0; half < 2; half++)
            sums.half[half] =
                add_products(sums.half[half], codes.part[j][half], vld1q_s16(activations + 16 * j + 8 * half));
    return converted(sums);
}

template <int R, int T>
inline void dots(
    const int16_t (*rows)[ROW_PITCH], const Activations *tokens, int64_t own, int64_t unit, int64_t count,
    Sums (*sums)[T])
{
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            sums[r][t] = {{vdupq_n_s32(0), vdupq_n_s32(0)}};
    for (int64_t i = 0; i < 64 * count; i += 16)
        for (int half = 0; half < 2; half++) {
            int16x8_t weights[R];
            for (int r = 0; r < R; r++)
                weights[r] = vld1q_s16(rows[r] + 64 * own + i + 8 * half);
            for (int t = 0; t < T; t++) {
                const int16x8_t activations = vld1q_s16(tokens[t].codes + 64 * unit + i + 8 * half);
                for (int r = 0; r < R; r++)
                    sums[r][t].half[half] = add_products(sums[r][t].half[half], weights[r], activations);
            }
        }
}

inline Lanes none()
{
    return {{vdupq_n_f32(0), vdupq_n_f32(0)}};
}

inline Lanes mul_add(Lanes sum, Lanes a, Lanes b)
{
    return {{vfmaq_f32(sum.half[0], a.half[0], b.half[0]), vfmaq_f32(sum.half[1], a.half[1], b.half[1])}};
}

/* A unit's factor, or one for each half. */
template <bool SPLIT> inline Lanes factor(const float *factors, int64_t unit)
{
    if (SPLIT)
        return {{vdupq_n_f32(factors[2 * unit]), vdupq_n_f32(factors[2 * unit + 1])}};
    return {{vdupq_n_f32(factors[unit]), vdupq_n_f32(factors[unit])}};
}

inline Floats none8()
{
    return none();
}

inline Floats all8(float value)
{
    return {{vdupq_n_f32(value), vdupq_n_f32(value)}};
}

inline Floats load8(const float *source)
{
    return {{vld1q_f32(source), vld1q_f32(source + 4)}};
}

inline void store8(float *out, Floats values)
{
    vst1q_f32(out, values.half[0]);
    vst1q_f32(out + 4, values.half[1]);
}

/* Half of each of eight bytes, the low one (SHIFT 0) or the high one (4), as numbers. */
template <int SHIFT> inline Floats nibbles8(const uint8_t *source)
{
    const uint8x8_t bytes = vld1_u8(source);
    const uint16x8_t codes = vmovl_u8(SHIFT ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15)));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(codes))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(codes)))}};
}

template <int TYPE> inline Floats widen8(const uint8_t *source, int64_t first)
{
    if (TYPE == FP_F32)
        return load8((const float *)source + first);
    const uint16x8_t words = vld1q_u16((const uint16_t *)source + first);
    if (TYPE == FP_F16) {
        const float16x8_t halves = vreinterpretq_f16_u16(words);
        return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)}};
    }
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))}};
}

inline Floats add8(Floats a, Floats b)
{
    return {{vaddq_f32(a.half[0], b.half[0]), vaddq_f32(a.half[1], b.half[1])}};
}

inline Floats mul_add8(Floats sum, Floats a, Floats b)
{
    return mul_add(sum, a, b);
}

inline float total8(Floats sum)
{
    return vaddvq_f32(vaddq_f32(sum.half[0], sum.half[1]));
}

inline float total(Lanes sum)
{
    return total8(sum);
}

struct Strip {
    float32x4_t part[4];
};

inline Strip load_strip(const float *source)
{
    return {{vld1q_f32(source), vld1q_f32(source + 4), vld1q_f32(source + 8), vld1q_f32(source + 12)}};
}

inline Strip strip_of(Floats low, Floats high)
{
    return {{low.half[0], low.half[1], high.half[0], high.half[1]}};
}

inline void store_strip(float *out, Strip strip)
{
    for (int i = 0; i < 4; i++)
        vst1q_f32(out + 4 * i, strip.part[i]);
}

template <int TYPE> inline Strip widen_strip(const uint8_t *source, int64_t first, int64_t count, int64_t)
{
    constexpr int bytes = TYPE == FP_F32 ? 4 : 2;
    alignas(16) uint8_t space[16 * bytes];
    if (count < 16) {
        memset(space, 0, sizeof space);
        memcpy(space, source + first * bytes, count * bytes);
        source = space;
        first = 0;
    }
    return strip_of(widen8<TYPE>(source, first), widen8<TYPE>(source, first + 8));
}

inline Lanes add_strip(Lanes sum, Strip a, Strip b)
{
    for (int i = 0; i < 4; i++)
        sum.half[i % 2] = vfmaq_f32(sum.half[i % 2], a.part[i], b.part[i]);
    return sum;
}

inline float largest64(const float *values, bool *finite)
{
    float32x4_t largest = vdupq_n_f32(0), poison = largest; /* NaN where a value is infinite or NaN */
    for (int i = 0; i < 64; i += 4) {
        const float32x4_t x = vld1q_f32(values + i);
        largest = vmaxnmq_f32(largest, vabsq_f32(x));
        poison = vfmaq_f32(poison, x, vdupq_n_f32(0));
    }
    *finite = *finite && vaddvq_f32(poison) == 0;
    return vmaxnmvq_f32(largest);
}

inline void round64(const float *values, float factor, int16_t *out, int32_t *half_sums)
{
    for (int half = 0; half < 2; half++) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 32 * half; i < 32 * half + 32; i += 8) {
            const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i), factor));
            const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i + 4), factor));
            sum = vaddq_s32(sum, vaddq_s32(a, b));
            vst1q_s16(out + i, vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)));
        }
        half_sums[half] = vaddvq_s32(sum);
    }
}

/* A unit's activations in the order of its codes. */
inline void reorder(int order, const int16_t *in, int16_t *out)
{
    for (int half = 0; half < 2; half++) {
        const int16_t *from = in + 32 * half;
        int16x8x4_t codes; /* vector j has codes 4 k + j */
        if (order == ORDER_STRAIGHT)
            for (int j = 0; j < 4; j++)
                codes.val[j] = vld1q_s16(from + 8 * j);
        else
            codes = vld4q_s16(from);
        for (int j = 0; j < 4; j++) {
            int16x8_t own = codes.val[j];
            if (order == ORDER_PAIRS) /* codes 8 (k % 4) + 4 (k / 4) + j: even places first, then odd ones */
                own = vcombine_s16(vget_low_s16(vuzp1q_s16(own, own)), vget_low_s16(vuzp2q_s16(own, own)));
            vst1q_s16(out + 16 * j + 8 * half, own);
        }
    }
}

} // namespace
#include "strips.h"
#include "body.h"
#include "decode.h"
#include "recurrent.h"

const Level level_neon = {"neon", false, prepare, nullptr, product, activate, normalize, attend, convolve, delta};
#endif

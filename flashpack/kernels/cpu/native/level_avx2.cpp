/* The kernels for x86-64 with AVX2 and FMA. */
#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

/* Units whose products are summed as integers, 32 in each sum. */
enum { BLOCK = 4, MOST_WEIGHT = 4095, TILE_ROWS = 4, TILE_TOKENS = 2 };

#include "floats_x86.inc"

typedef __m256i Sums;
typedef __m256 Lanes;

struct Codes {
    __m256i part[4];
};

inline __m256i both_halves(const uint8_t *low, const uint8_t *high)
{
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)), _mm_loadu_si128((const __m128i *)high), 1);
}

template <int BITS> inline __m256i code_bytes()
{
    alignas(16) uint8_t order[16];
    for (int i = 0; i < 8; i++) {
        order[2 * i] = (uint8_t)(i * BITS / 8);
        order[2 * i + 1] = (uint8_t)(i * BITS / 8 + 1);
    }
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)order));
}

template <int BITS> inline __m256i code_shifts()
{
    alignas(16) uint16_t factors[8];
    for (int i = 0; i < 8; i++)
        factors[i] = (uint16_t)(1u << (16 - BITS - i * BITS % 8));
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)factors));
}

template <int FORMAT> inline Codes unpack(const uint8_t *unit)
{
    Codes codes;
    if (FORMAT == 4) {
        const __m256i words = _mm256_loadu_si256((const __m256i *)unit), mask = _mm256_set1_epi16(15);
        codes.part[0] = _mm256_and_si256(words, mask);
        codes.part[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), mask);
        codes.part[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), mask);
        codes.part[3] = _mm256_srli_epi16(words, 12);
    } else if (FORMAT == MXFP4) {
        const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        const __m256i table = _mm256_broadcastsi128_si256(twice), mask = _mm256_set1_epi8(15);
        const __m256i words = _mm256_loadu_si256((const __m256i *)unit);
        const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(words, mask));
        const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(words, 4), mask));
        codes.part[0] = _mm256_srai_epi16(_mm256_slli_epi16(even, 8), 8);
        codes.part[1] = _mm256_srai_epi16(_mm256_slli_epi16(odd, 8), 8);
        codes.part[2] = _mm256_srai_epi16(even, 8);
        codes.part[3] = _mm256_srai_epi16(odd, 8);
    } else if (FORMAT == 2) {
        /* Each half's four words twice: codes 0 to 3 of each, then codes 4 to 7. */
        __m256i words = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)unit));
        words = _mm256_srlv_epi64(_mm256_permute4x64_epi64(words, 0x50), _mm256_setr_epi64x(0, 8, 0, 8));
        const __m256i mask = _mm256_set1_epi16(3);
        for (int j = 0; j < 4; j++)
            codes.part[j] = _mm256_and_si256(_mm256_srli_epi16(words, 2 * j), mask);
    } else if (FORMAT == 8) {
        for (int j = 0; j < 4; j++) {
            __m128d low = _mm_load_sd((const double *)(unit + 8 * j));
            low = _mm_loadh_pd(low, (const double *)(unit + 8 * j + 32));
            codes.part[j] = _mm256_cvtepu8_epi16(_mm_castpd_si128(low));
        }
    } else {
        /* Two bytes hold a code; a product moves it to the top of its word, and what is above falls out. */
        const __m256i bytes = code_bytes<FORMAT>(), shifts = code_shifts<FORMAT>();
        for (int j = 0; j < 4; j++) {
            const __m256i chunk = both_halves(unit + j * FORMAT, unit + (4 + j) * FORMAT);
            const __m256i words = _mm256_mullo_epi16(_mm256_shuffle_epi8(chunk, bytes), shifts);
            codes.part[j] = _mm256_srli_epi16(words, 16 - FORMAT);
        }
    }
    return codes;
}

/* Weights from codes: see block_scales in many.h. The first half's number lies in the low 128 bits of a vector. */
inline __m256i both_numbers(const int16_t *numbers)
{
    int32_t pair;
    memcpy(&pair, numbers, sizeof pair);
    const __m256i places = _mm256_set_epi64x(0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(pair), places);
}

template <int SHIFT>
inline void store_weights(int16_t *out, const Codes &codes, const int16_t *scales, const int16_t *biases)
{
    const __m256i scale = both_numbers(scales), bias = both_numbers(biases);
    for (int j = 0; j < 4; j++) {
        const __m256i product = _mm256_mulhrs_epi16(_mm256_slli_epi16(codes.part[j], SHIFT), scale);
        _mm256_store_si256((__m256i *)(out + 16 * j), _mm256_add_epi16(product, bias));
    }
}

inline __m256i codes_at(const int16_t *codes, int j)
{
    return _mm256_loadu_si256((const __m256i *)(codes + 16 * j));
}

inline Lanes converted(Sums sums)
{
    return _mm256_cvtepi32_ps(sums);
}

inline Lanes dot(const Codes &codes, const int16_t *activations)
{
    Sums sums = _mm256_madd_epi16(codes.part[0], codes_at(activations, 0));
    for (int j = 1; j < 4; j++)
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes.part[j], codes_at(activations, j)));
    return converted(sums);
}

template <int R, int T>
inline void dots(
    const int16_t (*rows)[ROW_PITCH], const Activations *tokens, int64_t own, int64_t unit, int64_t count,
    Sums (*sums)[T])
{
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            sums[r][t] = _mm256_setzero_si256();
    for (int64_t i = 0; i < 64 * count; i += 16) {
        __m256i weights[R];
        for (int r = 0; r < R; r++)
            weights[r] = codes_at(rows[r] + 64 * own + i, 0);
        for (int t = 0; t < T; t++) {
            const __m256i activations = codes_at(tokens[t].codes + 64 * unit + i, 0);
            for (int r = 0; r < R; r++) {
                sums[r][t] = _mm256_add_epi32(sums[r][t], _mm256_madd_epi16(weights[r], activations));
                /* Kept in this order: compilers would sum in another one and run out of registers. */
                __asm__("" : "+x"(sums[r][t]));
            }
        }
    }
}

inline Lanes none()
{
    return _mm256_setzero_ps();
}

inline Lanes mul_add(Lanes sum, Lanes a, Lanes b)
{
    return _mm256_fmadd_ps(a, b, sum);
}

/* A unit's factor, or one for each half. */
template <bool SPLIT> inline Lanes factor(const float *factors, int64_t unit)
{
    if (!SPLIT)
        return _mm256_broadcast_ss(factors + unit);
    return _mm256_insertf128_ps(
        _mm256_castps128_ps256(_mm_broadcast_ss(factors + 2 * unit)), _mm_broadcast_ss(factors + 2 * unit + 1), 1);
}

inline float total(Lanes sum)
{
    return total8(sum);
}

struct Strip {
    __m256 part[2];
};

inline Strip load_strip(const float *source)
{
    return {{_mm256_load_ps(source), _mm256_load_ps(source + 8)}};
}

inline Strip strip_of(Floats low, Floats high)
{
    return {{low, high}};
}

inline void store_strip(float *out, Strip strip)
{
    _mm256_store_ps(out, strip.part[0]);
    _mm256_store_ps(out + 8, strip.part[1]);
}

/* The first `count` of 16 numbers, then zeros. */
inline Strip first_of(Strip strip, int64_t count)
{
    alignas(32) static const int32_t mask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int i = 0; i < 2; i++)
        strip.part[i] = _mm256_and_ps(strip.part[i], _mm256_loadu_ps((const float *)(mask + 16 - count + 8 * i)));
    return strip;
}

template <int TYPE> inline Strip widen_16(const uint8_t *source, int64_t first)
{
    return {{widen8<TYPE>(source, first), widen8<TYPE>(source, first + 8)}};
}

/* Apart, for it is rare and would have all sums leave their registers. */
template <int TYPE> __attribute__((noinline)) Strip last_strip(const uint8_t *source, int64_t first, int64_t count)
{
    alignas(32) uint8_t space[16 * (TYPE == FP_F32 ? 4 : 2)] = {0};
    const int64_t bytes = (int64_t)sizeof space / 16;
    memcpy(space, source + first * bytes, count * bytes);
    return widen_16<TYPE>(space, 0);
}

/* What follows in memory is read with it if there is as much. */
template <int TYPE> FP_INLINE Strip widen_strip(const uint8_t *source, int64_t first, int64_t count, int64_t all)
{
    if (all != READABLE && first + 16 > all)
        return last_strip<TYPE>(source, first, count);
    return first_of(widen_16<TYPE>(source, first), count);
}

/* `count` times factor * 2^(code - 127), NaN for 255, then zeros. */
inline Strip powers_of_two(const uint8_t *codes, int64_t count, float factor)
{
    alignas(16) uint8_t space[16] = {0};
    memcpy(space, codes, count);
    const __m128i bytes = _mm_load_si128((const __m128i *)space);
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), half = _mm256_set1_epi32(0x00400000);
    Strip strip;
    for (int i = 0; i < 2; i++) {
        const __m256i code = _mm256_cvtepu8_epi32(i ? _mm_srli_si128(bytes, 8) : bytes);
        const __m256i odd = _mm256_or_si256(
            _mm256_cmpeq_epi32(code, _mm256_setzero_si256()), _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255)));
        const __m256i value = _mm256_or_si256(_mm256_slli_epi32(code, 23), _mm256_and_si256(odd, half));
        const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count - 8 * i), places);
        strip.part[i] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(value, there)), _mm256_set1_ps(factor));
    }
    return strip;
}

inline Lanes add_strip(Lanes sum, Strip a, Strip b)
{
    return _mm256_fmadd_ps(a.part[1], b.part[1], _mm256_fmadd_ps(a.part[0], b.part[0], sum));
}

/* Numbers of groups, for each half of a unit. */
template <int GROUP> inline Strip spread(Strip strip)
{
    if (GROUP == 32)
        return strip;
    const __m256i first = GROUP == 64 ? _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3) : _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i second = _mm256_add_epi32(first, _mm256_set1_epi32(GROUP == 64 ? 4 : 2));
    return {{_mm256_permutevar8x32_ps(strip.part[0], first), _mm256_permutevar8x32_ps(strip.part[0], second)}};
}

/* See many.h: a part's scales and biases, each for half a unit, as integers, and what these are worth in each block. */
inline void whole_numbers(
    Strip scales, Strip biases, float most, float one, int16_t *whole_scales, int16_t *whole_biases, float *worth)
{
    for (int i = 0; i < 2; i++) {
        bool finite = true;
        const float largest = _mm256_cvtss_f32(largest_weight(scales.part[i], biases.part[i], most, &finite));
        whole_eight(
            scales.part[i], biases.part[i], block_inverse(largest, finite), one, whole_scales + 8 * i,
            whole_biases + 8 * i);
        worth[i] = block_worth(largest, finite);
    }
}

enum { LANES = 8, BLOCKS = 2, BYTE_TOKENS = 4 };

typedef __m256i Words;
typedef __m256i Row;

inline Row load_row(const uint8_t *codes, bool half)
{
    const __m256i low = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)codes));
    return half ? low : _mm256_loadu_si256((const __m256i *)codes);
}

/* out[i] has word i of all rows. */
inline void transpose(const Row *rows, Words *out)
{
    __m256i a[8], b[8];
    for (int r = 0; r < 8; r += 2) {
        a[r] = _mm256_unpacklo_epi32(rows[r], rows[r + 1]);
        a[r + 1] = _mm256_unpackhi_epi32(rows[r], rows[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        b[r] = _mm256_unpacklo_epi64(a[r], a[r + 2]);
        b[r + 1] = _mm256_unpackhi_epi64(a[r], a[r + 2]);
        b[r + 2] = _mm256_unpacklo_epi64(a[r + 1], a[r + 3]);
        b[r + 3] = _mm256_unpackhi_epi64(a[r + 1], a[r + 3]);
    }
    for (int j = 0; j < 4; j++) {
        out[j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
        out[4 + j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
    }
}

inline Lanes in_order(Lanes sums)
{
    return sums;
}

inline Words low_nibbles(Words words)
{
    return _mm256_and_si256(words, _mm256_set1_epi8(15));
}

inline Words high_nibbles(Words words)
{
    return low_nibbles(_mm256_srli_epi16(words, 4));
}

inline Words shifted(Words codes)
{
    const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
}

inline Row row_of(Strip strip)
{
    return _mm256_castps_si256(strip.part[0]);
}

inline Lanes lanes_of(Words words)
{
    return _mm256_castsi256_ps(words);
}

inline Lanes multiplied(Lanes a, Lanes b)
{
    return _mm256_mul_ps(a, b);
}

/* Sums of STEPS words' products: of B blocks of rows, from codes[b] on, and T tokens, from a byte of theirs on.
 *
 * Products of codes up to MOST are summed in 16 bits first, of as many words as fit. */
template <int MOST, int B, int T, int STEPS>
FP_INLINE void byte_dots(const Words *const *codes, const Activations *tokens, int64_t byte, Sums (*products)[T])
{
    constexpr int together = 8 * 2 * MOST * 127 <= INT16_MAX ? 8 : 4;
    static_assert(together * 2 * MOST * 127 <= INT16_MAX && STEPS % together == 0, "16 bits");
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t *bytes[T];
    for (int t = 0; t < T; t++)
        bytes[t] = tokens[t].bytes + byte;
    for (int i = 0; i < STEPS; i += together) {
        __m256i pairs[B][T];
        for (int k = 0; k < together; k++) {
            __m256i weights[B];
            for (int b = 0; b < B; b++)
                weights[b] = codes[b][i + k];
            for (int t = 0; t < T; t++) {
                int32_t word;
                memcpy(&word, bytes[t] + 4 * (i + k), sizeof word);
                const __m256i activations = _mm256_set1_epi32(word);
                for (int b = 0; b < B; b++) {
                    const __m256i some = _mm256_maddubs_epi16(weights[b], activations);
                    pairs[b][t] = k ? _mm256_add_epi16(pairs[b][t], some) : some;
                    __asm__("" : "+x"(pairs[b][t])); /* in this order: see dots */
                }
            }
        }
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++) {
                const __m256i sums = _mm256_madd_epi16(pairs[b][t], ones);
                products[b][t] = i ? _mm256_add_epi32(products[b][t], sums) : sums;
                __asm__("" : "+x"(products[b][t]));
            }
    }
}

/* A unit's activations in the order of its codes. */
inline void reorder(int order, const int16_t *in, int16_t *out)
{
    for (int half = 0; half < 2; half++) {
        const __m128i *from = (const __m128i *)(in + 32 * half);
        __m128i v[4], w[4];
        for (int i = 0; i < 4; i++)
            v[i] = _mm_load_si128(from + i);
        if (order == ORDER_STRAIGHT) {
            for (int i = 0; i < 4; i++)
                w[i] = v[i];
        } else {
            /* codes 4 k + j -> vector j, place k */
            const __m128i a = _mm_unpacklo_epi16(v[0], v[1]), b = _mm_unpackhi_epi16(v[0], v[1]);
            const __m128i c = _mm_unpacklo_epi16(v[2], v[3]), d = _mm_unpackhi_epi16(v[2], v[3]);
            const __m128i e = _mm_unpacklo_epi16(a, b), f = _mm_unpackhi_epi16(a, b); /* codes 0 4 8 12 | 1 5 .. */
            const __m128i g = _mm_unpacklo_epi16(c, d), h = _mm_unpackhi_epi16(c, d);
            w[0] = _mm_unpacklo_epi64(e, g);
            w[1] = _mm_unpackhi_epi64(e, g);
            w[2] = _mm_unpacklo_epi64(f, h);
            w[3] = _mm_unpackhi_epi64(f, h);
            if (order == ORDER_PAIRS) { /* codes 8 (k % 4) + 4 (k / 4) + j: even places first, then odd ones */
                const __m128i even_odd = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
                for (int i = 0; i < 4; i++)
                    w[i] = _mm_shuffle_epi8(w[i], even_odd);
            }
        }
        for (int j = 0; j < 4; j++)
            _mm_storeu_si128((__m128i *)(out + 16 * j + 8 * half), w[j]);
    }
}

} // namespace
#define FP_BYTES /* 8-bit products: bytes.h */
#include "body.h"
#include "decode.h"
#include "recurrent.h"

const Level level_avx2 = {"avx2", false, prepare, prepare_bytes, product, activate, normalize, attend, convolve, delta};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

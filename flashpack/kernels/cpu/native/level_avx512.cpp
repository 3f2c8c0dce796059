/* The kernels for x86-64 with AVX512, its dot products of integers (VNNI) and its shuffles of bytes (VBMI).
 *
 * For many tokens, codes of a unit lie in two vectors of four lanes of eight words: lanes 0 and 2 hold codes of the first
 * half, lanes 1 and 3 of the second. For few they lie in one vector of bytes, in lanes of 16 likewise.
 */
#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")
/* gcc 12 warns of the undefined vectors that its own intrinsics begin with. */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

/* Units whose products are summed as integers, 32 in each sum. */
enum { BLOCK = 8, MOST_WEIGHT = 4095, TILE_ROWS = 4, TILE_TOKENS = 3 };

#include "floats_x86.inc"

typedef __m512i Sums;
typedef __m512 Lanes;

struct Codes {
    __m512i part[2];
};

/* Of vector i, lane and place: the code's number in its half. */
constexpr int code_number(int order, int i, int lane, int k)
{
    const int late = lane / 2;
    if (order == ORDER_NIBBLES)
        return 4 * k + 2 * i + late;
    if (order == ORDER_PAIRS)
        return 8 * (k % 4) + 4 * i + 2 * late + k / 4;
    return 16 * i + 8 * late + k;
}

/* For codes of 3, 5, 6 or 8 bits: which bytes of a unit each 64 bits get, for their four codes, and from which bit on
 * each byte takes eight. */
template <int BITS> struct Places {
    alignas(64) uint8_t bytes[2][64];
    alignas(64) uint8_t bits[64];

    constexpr Places() : bytes(), bits()
    {
        for (int i = 0; i < 2; i++)
            for (int word = 0; word < 32; word++) {
                const int lane = word / 8, k = word % 8, first = k / 4 * 4;
                const int at = BITS * (32 * (lane % 2) + code_number(ORDER_STRAIGHT, i, lane, first));
                for (int b = 0; b < 2; b++) {
                    const int byte = 2 * word + b;
                    const int source = at / 8 + byte % 8;
                    bytes[i][byte] = (uint8_t)(source < 64 ? source : 63);
                    bits[byte] = (uint8_t)(at % 8 + BITS * (k % 4) + 8 * b);
                }
            }
    }
};

template <int BITS> constexpr Places<BITS> places{};

inline __m512i lane_shifts(uint64_t early, uint64_t late)
{
    return _mm512_set_epi64(late, late, late, late, early, early, early, early);
}

template <int FORMAT> inline Codes unpack(const uint8_t *unit)
{
    Codes codes;
    if (FORMAT == 4 || FORMAT == MXFP4) {
        const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)unit));
        const uint64_t each = 0x0001000100010001;
        codes.part[0] = _mm512_srlv_epi16(words, lane_shifts(0, 4 * each));
        codes.part[1] = _mm512_srlv_epi16(words, lane_shifts(8 * each, 12 * each));
        if (FORMAT == 4) {
            const __m512i mask = _mm512_set1_epi16(15);
            for (int i = 0; i < 2; i++)
                codes.part[i] = _mm512_and_si512(codes.part[i], mask);
        } else {
            /* Of an index the lowest five bits count: twice the table. */
            const __m256i table = _mm256_setr_epi16(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
            const __m512i twice = _mm512_broadcast_i64x4(table);
            for (int i = 0; i < 2; i++)
                codes.part[i] = _mm512_permutexvar_epi16(codes.part[i], twice);
        }
    } else if (FORMAT == 2) {
        const __m512i both = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)unit));
        const __m512i words = _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 0, 0, 1, 1, 0, 0), both);
        const __m512i mask = _mm512_set1_epi16(3);
        const __m512i shifts = _mm512_set_epi64(6, 4, 6, 4, 2, 0, 2, 0);
        const __m512i early = _mm512_or_si512(shifts, _mm512_slli_epi64(shifts, 16));
        const __m512i each = _mm512_or_si512(early, _mm512_slli_epi64(early, 32));
        codes.part[0] = _mm512_and_si512(_mm512_srlv_epi16(words, each), mask);
        codes.part[1] = _mm512_and_si512(_mm512_srlv_epi16(words, _mm512_add_epi16(each, _mm512_set1_epi16(8))), mask);
    } else {
        constexpr int BITS = FORMAT == 3 || FORMAT == 5 || FORMAT == 6 ? FORMAT : 8;
        const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (64 - 8 * BITS), unit);
        const __m512i bits = _mm512_load_si512(places<BITS>.bits), mask = _mm512_set1_epi16((1 << BITS) - 1);
        for (int i = 0; i < 2; i++) {
            const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(places<BITS>.bytes[i]), bytes);
            codes.part[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(bits, words), mask);
        }
    }
    return codes;
}

inline __m512i codes_at(const int16_t *codes)
{
    return _mm512_loadu_si512(codes);
}

/* What a half's lanes get of a pair. */
inline __m512i both_numbers(const int16_t *numbers)
{
    int32_t pair;
    memcpy(&pair, numbers, sizeof pair);
    const __m512i words = _mm512_set_epi64(
        0x0302030203020302, 0x0302030203020302, 0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
        0x0302030203020302, 0x0100010001000100, 0x0100010001000100);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(pair), words);
}

template <int SHIFT>
inline void store_weights(int16_t *out, const Codes &codes, const int16_t *scales, const int16_t *biases)
{
    const __m512i scale = both_numbers(scales), bias = both_numbers(biases);
    for (int i = 0; i < 2; i++) {
        const __m512i product = _mm512_mulhrs_epi16(_mm512_slli_epi16(codes.part[i], SHIFT), scale);
        _mm512_store_si512(out + 32 * i, _mm512_add_epi16(product, bias));
    }
}

inline Lanes converted(Sums sums)
{
    return _mm512_cvtepi32_ps(sums);
}

template <int R, int T>
inline void dots(
    const int16_t (*rows)[ROW_PITCH], const Activations *tokens, int64_t own, int64_t unit, int64_t count,
    Sums (*sums)[T])
{
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            sums[r][t] = _mm512_setzero_si512();
    for (int64_t i = 0; i < 64 * count; i += 32) {
        __m512i weights[R];
        for (int r = 0; r < R; r++)
            weights[r] = codes_at(rows[r] + 64 * own + i);
        for (int t = 0; t < T; t++) {
            const __m512i activations = codes_at(tokens[t].codes + 64 * unit + i);
            for (int r = 0; r < R; r++) {
                sums[r][t] = _mm512_dpwssd_epi32(sums[r][t], weights[r], activations);
                /* Kept in this order: compilers would sum in another one and run out of registers. */
                __asm__("" : "+v"(sums[r][t]));
            }
        }
    }
}

inline Lanes none()
{
    return _mm512_setzero_ps();
}

inline Lanes mul_add(Lanes sum, Lanes a, Lanes b)
{
    return _mm512_fmadd_ps(a, b, sum);
}

/* A unit's factor, or one for each half. */
template <bool SPLIT> inline Lanes factor(const float *factors, int64_t unit)
{
    if (!SPLIT)
        return _mm512_set1_ps(factors[unit]);
    double pair;
    memcpy(&pair, factors + 2 * unit, sizeof pair);
    const __m512i places = _mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(places, _mm512_castpd_ps(_mm512_set1_pd(pair)));
}

inline float total(Lanes sum)
{
    return total8(_mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1)));
}

typedef __m512 Strip;

template <int TYPE> inline Strip widen_strip(const uint8_t *source, int64_t first, int64_t count, int64_t)
{
    const __mmask16 mask = (__mmask16)(0xFFFF >> (16 - count));
    if (TYPE == FP_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)source + first);
    const __m256i words = _mm256_maskz_loadu_epi16(mask, source + 2 * first);
    if (TYPE == FP_F16)
        return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline Strip load_strip(const float *source)
{
    return _mm512_load_ps(source);
}

inline Strip strip_of(Floats low, Floats high)
{
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

inline void store_strip(float *out, Strip strip)
{
    _mm512_store_ps(out, strip);
}

/* `count` times factor * 2^(code - 127), NaN for 255, then zeros. */
inline Strip powers_of_two(const uint8_t *codes, int64_t count, float factor)
{
    const __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)(0xFFFF >> (16 - count)), codes);
    const __m512i code = _mm512_cvtepu8_epi32(bytes), half = _mm512_set1_epi32(0x00400000);
    const __mmask16 odd = _mm512_cmpeq_epi32_mask(code, _mm512_setzero_si512()) |
                          _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
    const __m512i value = _mm512_mask_or_epi32(_mm512_slli_epi32(code, 23), odd, _mm512_slli_epi32(code, 23), half);
    return _mm512_maskz_mul_ps(
        (__mmask16)(0xFFFF >> (16 - count)), _mm512_castsi512_ps(value), _mm512_set1_ps(factor));
}

inline Lanes add_strip(Lanes sum, Strip a, Strip b)
{
    return _mm512_fmadd_ps(a, b, sum);
}

/* Numbers of groups, for each half of a unit. */
template <int GROUP> inline Strip spread(Strip strip)
{
    if (GROUP == 32)
        return strip;
    const __m512i places = GROUP == 64 ? _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)
                                       : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(places, strip);
}

/* See many.h: a part's scales and biases, each for half a unit, as integers, and what these are worth in each block. */
inline void whole_numbers(
    Strip scales, Strip biases, float most, float one, int16_t *whole_scales, int16_t *whole_biases, float *worth)
{
    bool finite = true;
    const __m256 low_scales = _mm512_castps512_ps256(scales), low_biases = _mm512_castps512_ps256(biases);
    const __m256 high_scales = _mm512_extractf32x8_ps(scales, 1), high_biases = _mm512_extractf32x8_ps(biases, 1);
    const float largest = _mm256_cvtss_f32(_mm256_max_ps(
        largest_weight(low_scales, low_biases, most, &finite), largest_weight(high_scales, high_biases, most, &finite)));
    const float inverse = block_inverse(largest, finite);
    whole_eight(low_scales, low_biases, inverse, one, whole_scales, whole_biases);
    whole_eight(high_scales, high_biases, inverse, one, whole_scales + 8, whole_biases + 8);
    *worth = block_worth(largest, finite);
}

enum { LANES = 16, BLOCKS = 2, BYTE_TOKENS = 6 };

typedef __m512i Words;
typedef __m256i Row;

inline Row load_row(const uint8_t *codes, bool half)
{
    return _mm256_maskz_loadu_epi8(half ? 0xFFFF : 0xFFFFFFFF, codes);
}

/* out[i] has word i of all rows, in the order 0-3, 8-11, 4-7, 12-15. */
inline void transpose(const Row *rows, Words *out)
{
    __m512i a[8], b[8];
    for (int r = 0; r < 8; r++)
        a[r] = _mm512_inserti64x4(_mm512_castsi256_si512(rows[r]), rows[r + 8], 1);
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    for (int j = 0; j < 4; j++) {
        out[j] = _mm512_shuffle_i64x2(a[j], a[4 + j], 0x88);
        out[4 + j] = _mm512_shuffle_i64x2(a[j], a[4 + j], 0xDD);
    }
}

/* From that order to the rows' own. */
inline Lanes in_order(Lanes sums)
{
    return _mm512_shuffle_f32x4(sums, sums, 0xD8);
}

inline Words low_nibbles(Words words)
{
    return _mm512_and_si512(words, _mm512_set1_epi8(15));
}

inline Words high_nibbles(Words words)
{
    return low_nibbles(_mm512_srli_epi16(words, 4));
}

inline Words shifted(Words codes)
{
    const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
}

inline Row row_of(Strip strip)
{
    return _mm256_castps_si256(_mm512_castps512_ps256(strip));
}

inline Lanes lanes_of(Words words)
{
    return _mm512_castsi512_ps(words);
}

inline Lanes multiplied(Lanes a, Lanes b)
{
    return _mm512_mul_ps(a, b);
}

/* Sums of STEPS words' products: of B blocks of rows, from codes[b] on, and T tokens, from a byte of theirs on. */
template <int, int B, int T, int STEPS>
inline void byte_dots(const Words *const *codes, const Activations *tokens, int64_t byte, Sums (*products)[T])
{
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            products[b][t] = _mm512_setzero_si512();
    for (int i = 0; i < STEPS; i++) {
        __m512i weights[B];
        for (int b = 0; b < B; b++)
            weights[b] = codes[b][i];
        for (int t = 0; t < T; t++) {
            int32_t word;
            memcpy(&word, tokens[t].bytes + byte + 4 * i, sizeof word);
            const __m512i activations = _mm512_set1_epi32(word);
            for (int b = 0; b < B; b++) {
                products[b][t] = _mm512_dpbusd_epi32(products[b][t], weights[b], activations);
                /* Kept in this order: compilers would sum in another one and run out of registers. */
                __asm__("" : "+v"(products[b][t]));
            }
        }
    }
}

/* For each place of a unit: which of its activations belongs there. */
template <int ORDER> struct Order {
    alignas(64) uint16_t from[64];

    constexpr Order() : from()
    {
        for (int i = 0; i < 2; i++)
            for (int place = 0; place < 32; place++) {
                const int lane = place / 8;
                from[32 * i + place] = (uint16_t)(32 * (lane % 2) + code_number(ORDER, i, lane, place % 8));
            }
    }
};

template <int ORDER> constexpr Order<ORDER> order_of{};

/* A unit's activations in the order of its codes. */
inline void reorder(int order, const int16_t *in, int16_t *out)
{
    const uint16_t *from = order == ORDER_NIBBLES ? order_of<ORDER_NIBBLES>.from
                           : order == ORDER_PAIRS ? order_of<ORDER_PAIRS>.from
                                                  : order_of<ORDER_STRAIGHT>.from;
    const __m512i low = codes_at(in), high = codes_at(in + 32);
    for (int i = 0; i < 2; i++)
        _mm512_storeu_si512(
            out + 32 * i, _mm512_permutex2var_epi16(low, _mm512_load_si512(from + 32 * i), high));
}

/* Of a unit's byte, as fine_dot unpacks them: the number of its code. */
constexpr int plane_number(int order, int byte)
{
    const int word = byte / 8, k = byte % 8; /* words of 64 bits */
    if (order == ORDER_NIBBLES)
        return 2 * (byte % 32) + byte / 32;
    if (order == ORDER_PAIRS)
        return 32 * (word / 2 % 2) + 4 * k + 2 * (word / 4) + word % 2;
    return 32 * (word / 2 % 2) + 16 * (word / 4) + 8 * (word % 2) + k;
}

/* For codes of 3, 5 or 6 bits: which bytes of a unit each 64 bits get, for their eight codes. */
template <int BITS> struct PlanePlaces {
    alignas(64) uint8_t bytes[64];

    constexpr PlanePlaces() : bytes()
    {
        for (int byte = 0; byte < 64; byte++) {
            const int source = BITS * plane_number(ORDER_STRAIGHT, byte / 8 * 8) / 8 + byte % 8;
            bytes[byte] = (uint8_t)(source < 64 ? source : 63);
        }
    }
};

template <int BITS> constexpr PlanePlaces<BITS> plane_places{};

/* A unit's codes, each in a byte: of the 16 sums of four, four and four belong to the same half. */
template <int FORMAT> inline __m512i unpack_bytes_of_unit(const uint8_t *unit)
{
    if (FORMAT == 4 || FORMAT == MXFP4) {
        const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)unit));
        const __m512i codes = _mm512_and_si512(
            _mm512_srlv_epi16(both, lane_shifts(0, 0x0004000400040004)), _mm512_set1_epi8(15));
        return FORMAT == 4 ? codes : shifted(codes);
    }
    if (FORMAT == 2) {
        const __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)unit));
        const __m512i words = _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 0, 0, 1, 1, 0, 0), bytes);
        const uint64_t each = 0x0001000100010001;
        const __m512i shifts = _mm512_set_epi64(6 * each, 4 * each, 6 * each, 4 * each, 2 * each, 0, 2 * each, 0);
        return _mm512_and_si512(_mm512_srlv_epi16(words, shifts), _mm512_set1_epi8(3));
    }
    constexpr int BITS = FORMAT == 3 || FORMAT == 5 || FORMAT == 6 ? FORMAT : 8;
    const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (64 - 8 * BITS), unit);
    const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(plane_places<BITS>.bytes), bytes);
    if (BITS == 8)
        return words;
    const uint64_t first = BITS | 2 * BITS << 8 | 3 * BITS << 16; /* bits of codes 1, 2, 3 */
    const uint64_t low = first << 8, high = (first << 8) + 4 * BITS * 0x01010101ull;
    return _mm512_and_si512(
        _mm512_multishift_epi64_epi8(_mm512_set1_epi64((long long)(high << 32 | low)), words),
        _mm512_set1_epi8((1 << BITS) - 1));
}

/* Products of codes and activations: of the upper bits of these, then of the lower seven. */
template <int FORMAT> inline Lanes fine_dot(const uint8_t *unit, const int8_t *planes)
{
    const __m512i codes = unpack_bytes_of_unit<FORMAT>(unit);
    const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(planes));
    return converted(_mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 7), codes, _mm512_loadu_si512(planes + 64)));
}

inline Lanes all_lanes(float value)
{
    return _mm512_set1_ps(value);
}

/* For each byte of a unit: which activation belongs there. */
template <int ORDER> struct PlaneOrder {
    alignas(64) uint8_t from[64];

    constexpr PlaneOrder() : from()
    {
        for (int byte = 0; byte < 64; byte++)
            from[byte] = (uint8_t)plane_number(ORDER, byte);
    }
};

template <int ORDER> constexpr PlaneOrder<ORDER> plane_order{};

/* Words that are bytes, in another order. */
inline __m512i ordered_bytes(__m512i low, __m512i high, const uint8_t *from)
{
    const __m512i bytes =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
    return _mm512_permutexvar_epi8(_mm512_load_si512(from), bytes);
}

/* A unit's activations in the order of its codes: 64 times their upper bits, 64 times the lower seven. */
inline void reorder_planes(int order, const int16_t *in, int8_t *out)
{
    const uint8_t *from = order == ORDER_NIBBLES ? plane_order<ORDER_NIBBLES>.from
                          : order == ORDER_PAIRS ? plane_order<ORDER_PAIRS>.from
                                                 : plane_order<ORDER_STRAIGHT>.from;
    const __m512i low = codes_at(in), high = codes_at(in + 32), seven = _mm512_set1_epi16(127);
    _mm512_storeu_si512(out, ordered_bytes(_mm512_srai_epi16(low, 7), _mm512_srai_epi16(high, 7), from));
    _mm512_storeu_si512(out + 64, ordered_bytes(_mm512_and_si512(low, seven), _mm512_and_si512(high, seven), from));
}

} // namespace
#define FP_PLANES /* two planes of bytes for few tokens: one.h */
#define FP_BYTES /* 8-bit products: bytes.h */
#include "body.h"
#include "decode.h"
#include "recurrent.h"

const Level level_avx512 = {"avx512", true, prepare, prepare_bytes, product, activate, normalize, attend, convolve, delta};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

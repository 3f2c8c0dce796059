/* Affine quantize-and-pack, bit for bit what flashpack.formats.affine gives (SPEC.md section 6).
 *
 * Plain C without Python; called through ctypes, which lets other threads run meanwhile. Nothing here keeps state.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "needs exact single precision"
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs little-endian byte order"
#endif

#define ABI 3 /* goes up when a function below changes; the loader compares it with its own */
#define TILE 1024
#define TABLE static const

typedef float float4 __attribute__((vector_size(16)));
typedef float float8 __attribute__((vector_size(32)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef int32_t int8 __attribute__((vector_size(32)));

#define SELECT(mask, a, b) ((VECTOR)(((mask) & (INTEGERS)(a)) | (~(mask) & (INTEGERS)(b))))
#define BITS(x) ((INTEGERS)(x))
#define INLINE TARGET static inline __attribute__((always_inline))

#include "quantize_numbers.h"

#define TARGET
#define NAME(x) x##_portable
#define LANES 4
#define VECTOR float4
#define INTEGERS int4
#define GREATER(a, b) SELECT((a) > (b), a, b)
#define LESSER(a, b) SELECT((a) < (b), a, b)
#include "quantize_body.h"

#if defined(__x86_64__)
#define HAVE_AVX2 1
#define TARGET __attribute__((target("avx2")))
#define NAME(x) x##_avx2
#define LANES 8
#define VECTOR float8
#define INTEGERS int8
#define GREATER(a, b) __builtin_ia32_maxps256(a, b) /* b if one is NaN, as a > b ? a : b */
#define LESSER(a, b) __builtin_ia32_minps256(a, b)
#include "quantize_body.h"
#else
#define HAVE_AVX2 0
#endif

int flashpack_abi(void)
{
    return ABI;
}

/* The best instruction set of this build that the processor has: 1 AVX2, 0 the build's own. */
int flashpack_level(void)
{
#if HAVE_AVX2
    return __builtin_cpu_supports("avx2") ? 1 : 0;
#else
    return 0;
#endif
}

/* `count` values at `source` in groups of `size` -> words [count * bits / 32], scales and biases [count / size].
 *
 * Types: 0 bfloat16, 1 float16, 2 float32. Arrays need no alignment. `level` is at most what flashpack_level says.
 * `starts`: 0 rounds between minimum and maximum, 1 searches for the least squared error.
 * sums: squared error and squared values, each group's added up in double precision in the order of the groups; the
 * first is infinite or NaN exactly if a value, or what it decodes to, is. Returns 0, or -1 if an argument is out of
 * range.
 */
int flashpack_quantize(
    const void *source, int source_type, size_t count, int bits, int size, int scale_type, int starts,
    void *words, void *scales, void *biases, double *sums, int level)
{
    sums[0] = sums[1] = 0;
    if (source_type < 0 || source_type > 2 || scale_type < 0 || scale_type > 2 || level < 0 || level > HAVE_AVX2)
        return -1;
    if (bits < 2 || bits > 8 || bits == 7 || (size != 32 && size != 64 && size != 128) || count % (size_t)size)
        return -1;
#if HAVE_AVX2
    if (level == 1) {
        quantize_avx2(source, source_type, count, bits, size, scale_type, starts, words, scales, biases, sums, 0);
        return 0;
    }
#endif
    quantize_portable(source, source_type, count, bits, size, scale_type, starts, words, scales, biases, sums, 0);
    return 0;
}

/* The same in the encoding affine_dq: words [count * bits / 32], codes [count / 32] and blocks [count / 256][3]. */
int flashpack_quantize_dq(
    const void *source, int source_type, size_t count, int bits, int starts,
    void *words, void *scales, void *blocks, double *sums, int level)
{
    sums[0] = sums[1] = 0;
    if (source_type < 0 || source_type > 2 || level < 0 || level > HAVE_AVX2 || bits < 2 || bits > 4 ||
        count % DQ_BLOCK)
        return -1;
#if HAVE_AVX2
    if (level == 1) {
        quantize_dq_avx2(source, source_type, count, bits, starts, words, scales, blocks, sums, 0);
        return 0;
    }
#endif
    quantize_dq_portable(source, source_type, count, bits, starts, words, scales, blocks, sums, 0);
    return 0;
}

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
#include "level_avx2.inc"
}
#include "body.h"
#include "decode.h"

const Level level_avx2 = {"avx2", prepare, product, activate, normalize, attend};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

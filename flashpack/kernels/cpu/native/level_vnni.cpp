/* The kernels for x86-64 with AVX512's dot products of integers, in vectors of 256 bits: memory is the limit. */
#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512vnni")
#endif

#define FP_VNNI
namespace {
#include "level_avx2.inc"
}
#include "body.h"
#include "decode.h"

const Level level_vnni = {"avx512-vnni", prepare, product, activate, normalize, attend};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

/* The native quantizer (kernels/cpu/native) for a GPU: the same source with one lane, a group or a block a thread.
 *
 * To be compiled without contraction (--fmad=false); division and denormals are then as IEEE has them. NVRTC brings no
 * headers, so what the source needs of them stands here. */
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif
#define TABLE __device__ const
#define TILE 128

#include "quantize_numbers.h"

#define TARGET __device__
#define INLINE __device__ __forceinline__
#define NAME(x) x##_cuda
#define LANES 1
#define VECTOR float
#define INTEGERS uint32_t
#define BITS(x) NAME(as_word)(x)
#define GREATER(a, b) ((a) > (b) ? (a) : (b))
#define LESSER(a, b) ((a) < (b) ? (a) : (b))
#include "quantize_body.h"

/* One kernel at a time, since the search takes seconds to compile: with GROUP defined, that of affine with groups of so
 * many values, else that of affine_dq. */
#ifdef GROUP

/* flashpack_quantize of `groups` groups; a pair of sums for each. */
extern "C" __global__ void quantize_affine(
    const uint8_t *source, int source_type, int groups, int bits, int scale_type, int starts,
    uint8_t *words, uint8_t *scales, uint8_t *biases, double *sums)
{
    const size_t group = (size_t)blockIdx.x * blockDim.x + threadIdx.x, wide = scale_type == TYPE_F32 ? 4 : 2;
    if (group < (size_t)groups)
        tiles_cuda(
            source + group * GROUP * (source_type == TYPE_F32 ? 4 : 2), source_type, GROUP, bits, GROUP, scale_type,
            starts, words + group * GROUP * bits / 8, scales + group * wide, biases + group * wide, sums + group * 2, 2);
}

#else

/* flashpack_quantize_dq of `count` blocks; a pair of sums for each group. */
extern "C" __global__ void quantize_affine_dq(
    const uint8_t *source, int source_type, int count, int bits, int starts,
    uint8_t *words, uint8_t *scales, uint8_t *blocks, double *sums)
{
    const size_t block = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (block < (size_t)count)
        quantize_dq_cuda(
            source + block * DQ_BLOCK * (source_type == TYPE_F32 ? 4 : 2), source_type, DQ_BLOCK, bits, starts,
            words + block * DQ_BLOCK * bits / 8, scales + block * DQ_GROUPS, blocks + block * 6,
            sums + block * 2 * DQ_GROUPS, 2);
}

#endif

/* What stored matrices are made of (SPEC.md section 6), once for the kernels of all devices: C++14, as Metal's compiler
 * takes it, too. Everything here is integers: what a float is made of, not the float. */
#ifndef FLASHPACK_BLOCKS_H
#define FLASHPACK_BLOCKS_H

namespace blocks {

/* Types of numbers: of plain matrices, scales and biases. NIBBLES: codes of a scale and a bias in one byte. */
enum Number { BF16 = 0, F16 = 1, F32 = 2, E8M0 = 3, E4M3 = 4, NIBBLES = 5 };

/* Bytes of a number. */
constexpr unsigned size_of(unsigned type)
{
    return type == F32 ? 4 : type == BF16 || type == F16 ? 2 : 1;
}

/* Values that share a scale. */
enum { MXFP4_GROUP = 32, NVFP4_GROUP = 16 };

/* affine_dq: values of a group, groups of a block, bytes of a block's numbers, which are BF16. A group's scale is
 * DQ_SCALE_STEP times the low half of its byte, its bias is DQ_BIAS and DQ_BIAS_STEP times the high half. */
enum { DQ_GROUP = 32, DQ_GROUPS = 8, DQ_BYTES = 6 };
enum DqNumber { DQ_SCALE_STEP = 0, DQ_BIAS = 1, DQ_BIAS_STEP = 2 };

/* What nvfp4's scales go through with the matrix's one. */
enum GlobalScale { GLOBAL_NONE = 0, GLOBAL_MULTIPLY = 1, GLOBAL_DIVIDE = 2 };

/* Codes of 1 to 8 bits are one stream of little-endian words: where code i is, the lowest of its bits first. */
constexpr unsigned word_of(unsigned bits, unsigned i)
{
    return i * bits / 32;
}

constexpr unsigned shift_of(unsigned bits, unsigned i)
{
    return i * bits % 32;
}

/* Whether the rest of code i is in the next word. */
constexpr bool is_split(unsigned bits, unsigned i)
{
    return shift_of(bits, i) + bits > 32;
}

constexpr unsigned mask_of(unsigned bits)
{
    return (1u << bits) - 1;
}

/* Bytes of so many codes. */
constexpr unsigned bytes_of(unsigned bits, unsigned codes)
{
    return codes * bits / 8;
}

/* Twice the value of a 4-bit float. */
constexpr int twice_fp4(unsigned code)
{
    return ((code & 7) < 4 ? int(code & 7) : int(2 + (code & 1)) << ((code & 7) / 2 - 1)) * (code & 8 ? -1 : 1);
}

/* The bits of a 16-bit float that is 2^14 times smaller than a 4-bit float; of two at once, at bits 0 and 16. */
enum { FP4_SCALE = 1 << 14 };

constexpr unsigned fp4_halves(unsigned codes)
{
    return (codes & 0x00070007u) << 9 | (codes & 0x00080008u) << 12;
}

/* The same for an 8-bit float that is a number, 2^8 times smaller; of one. */
enum { FP8_SCALE = 1 << 8 };

constexpr unsigned fp8_half(unsigned code)
{
    return (code & 127) << 7 | (code & 128) << 8;
}

constexpr bool fp8_is_nan(unsigned code)
{
    return (code & 127) == 127;
}

/* The bits of the float32 2^(code - 127); 255 is NaN. */
constexpr unsigned e8m0_bits(unsigned code)
{
    return code == 0 ? 0x00400000u : code == 255 ? 0x7FC00000u : code << 23;
}

/* 2^25 times a positive 16-bit float, from its bits, if that is an integer below 2^32. */
constexpr unsigned half_value(unsigned bits)
{
    return bits >> 10 ? (1024 + (bits & 1023)) << (bits >> 10) : (bits & 1023) << 1;
}

static_assert(word_of(3, 10) == 0 && shift_of(3, 10) == 30 && is_split(3, 10), "3-bit codes straddle words");
static_assert(bytes_of(5, 32) == 20 && mask_of(8) == 255, "32 codes are as many words as a code has bits");
static_assert(twice_fp4(3) == 3 && twice_fp4(7) == 12 && twice_fp4(9) == -1, "codes 3, 7 and 9");
static_assert(half_value(fp4_halves(7)) == 6u << (25 - 14), "6");
static_assert(half_value(fp8_half(1)) == 1u << (25 - 8 - 9) && half_value(fp8_half(0x78)) == 1u << 25, "2^-9 and 2^8");

} // namespace blocks

#endif

/* The products, once for each instruction set: a level_*.cpp defines the primitives below and includes this.
 *
 * A row of weights is taken in units of 64 codes (an incomplete one is padded with zeros), whose halves of 32 may have
 * different scales. In which order a unit's codes lie in vectors is a level's own matter: its `reorder` puts activations
 * into the order of its `unpack`, so that unpacking needs few shuffles.
 *
 * For each row and token the operations and their order do not depend on what is computed beside it, but for whether
 * there are more than FEW_TOKENS tokens: results depend neither on how rows are cut nor on threads.
 *
 * Primitives: Codes, unpack<FORMAT>(bytes); reorder(order, activations); Lanes (float32), none(), factor<SPLIT>(scales,
 * unit), mul_add(sum, Lanes, factor), total(Lanes); for few tokens dot(Codes, activations) -> Lanes, or, with FP_PLANES,
 * fine_dot<FORMAT>(bytes, planes) -> Lanes, reorder_planes, multiplied, all_lanes; Sums (int32),
 * converted(Sums) -> Lanes, MOST_WEIGHT, TILE_ROWS, TILE_TOKENS, store_weights<SHIFT>(Codes, scales, biases),
 * dots<R, T>(weights, tokens) -> Sums; Floats (eight float32), none8, all8, load8, store8, add8, mul_add8, total8,
 * widen8<TYPE>; Strip (16 float32), widen_strip<TYPE>, powers_of_two, load_strip, store_strip, add_strip, spread<GROUP>,
 * whole_numbers; largest64, round64, prefetch.
 */
#include "numbers.h"
#include "one.h"
#include "many.h"
#if defined(FP_BYTES)
#include "bytes.h"
#endif
#include "plain.h"
#include "activate.h"

namespace {

template <int FORMAT, int GROUP>
void packed_product(
    const fp_matrix &m, const Shape &s, int64_t first, int64_t last, const Activations *tokens, int64_t count,
    float *out, int64_t stride)
{
    if (count <= FEW_TOKENS) {
        /* Several tokens take few rows at a time, which are read from memory for the first of them only. */
        const int64_t step = count == 1 ? last - first : ROWS;
        for (int64_t row = first; row < last; row += step) {
            const int64_t end = row + step < last ? row + step : last;
            for (int64_t t = 0; t < count; t++) {
                float *own = out + t * stride + row - first;
                const int64_t next = rows_of_one<FORMAT, GROUP, ROWS>(m, s, row, end, tokens[t], own);
                rows_of_one<FORMAT, GROUP, 1>(m, s, next, end, tokens[t], own + next - row);
            }
        }
        return;
    }
#if defined(FP_BYTES)
    if constexpr (FORMAT == 4 || FORMAT == MXFP4)
        if (tokens->bytes) {
            for (int64_t t = 0; t < count; t += TOKENS)
                for (int64_t row = first; row < last; row += LANES * BLOCKS)
                    rows_of_bytes<FORMAT, GROUP>(
                        m, s, row, last, tokens + t, count - t < TOKENS ? (int)(count - t) : TOKENS,
                        out + t * stride + row - first, stride);
            return;
        }
#endif
    for (int64_t t = 0; t < count; t += TOKENS)
        for (int64_t row = first; row < last; row += ROWS)
            rows_of_many<FORMAT, GROUP>(
                m, s, row, last - row < ROWS ? (int)(last - row) : ROWS, tokens + t,
                count - t < TOKENS ? (int)(count - t) : TOKENS, out + t * stride + row - first, stride);
}

template <int FORMAT> constexpr auto by_group(int group)
{
    return group == 32   ? packed_product<FORMAT, 32>
           : group == 64 ? packed_product<FORMAT, 64>
                         : packed_product<FORMAT, 128>;
}

void product(
    const fp_matrix &m, const Shape &s, int64_t first, int64_t last, const Activations *tokens, int64_t count,
    float *out, int64_t stride)
{
    if (m.kind == FP_AFFINE || m.kind == FP_MXFP4) {
        const auto packed = m.kind == FP_MXFP4 ? packed_product<MXFP4, 32>
                            : m.bits == 2      ? by_group<2>(s.group)
                            : m.bits == 3      ? by_group<3>(s.group)
                            : m.bits == 4      ? by_group<4>(s.group)
                            : m.bits == 5      ? by_group<5>(s.group)
                            : m.bits == 6      ? by_group<6>(s.group)
                                               : by_group<8>(s.group);
        packed(m, s, first, last, tokens, count, out, stride);
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

} // namespace

/* Products of packed rows with several tokens.
 *
 * Rows are unpacked to 16-bit integers that are worth the same in a block of BLOCK units, so that the products of a block
 * are exact integer sums without scales: an integer is at most MOST_WEIGHT, which each level chooses so that the sums of
 * a block fit into 32 bits. Rounding changes a weight by at most 1.5 / MOST_WEIGHT of the largest in its block.
 *
 * A weight is code * 2^(15 - bits) * scale / 2^15 + bias, rounded twice, with `whole_numbers` of scales and biases.
 */

namespace {

/* Up to PART units of a row, from `unit` on but before `end`, as weights; what these are worth in each block. */
template <int FORMAT, int GROUP>
inline void unpack_part(
    const fp_matrix &m, const Shape &s, int64_t row, int64_t unit, int64_t end, int16_t *weights, float *worth)
{
    constexpr int bits = FORMAT == MXFP4 ? 4 : FORMAT;
    constexpr float most = FORMAT == MXFP4 ? 12 : (1 << bits) - 1;
    alignas(64) int16_t whole_scales[2 * PART], whole_biases[2 * PART];
    end = unit + PART < end ? unit + PART : end;
    const int64_t group = groups_before(s, unit), groups = groups_before(s, end) - group;
    const int64_t first = row * s.groups + group, all = m.rows * s.groups, complete = uncopied<FORMAT>(s);
    const Strip scales = spread<GROUP>(scales_of<FORMAT, GROUP>(m, m.scale_type, first, groups, all));
    const Strip biases =
        FORMAT == MXFP4 ? Strip{} : spread<GROUP>(biases_of<GROUP>(m, m.scale_type, first, groups, all));
    whole_numbers(scales, biases, most, 1 << bits, whole_scales, whole_biases, worth);
    const uint8_t *source = m.weight + (row * m.width + 64 * unit) * unit_bytes(FORMAT) / 64;
    /* The same place of rows to come. */
    const int64_t next = 2 * ROWS * m.width * unit_bytes(FORMAT) / 64;
    for (int64_t byte = 0; byte < (end - unit) * unit_bytes(FORMAT); byte += 64)
        prefetch(source + next + byte);
    prefetch_numbers(m, first + 2 * ROWS * s.groups);
    for (int64_t u = unit; u < end; u++, source += unit_bytes(FORMAT)) {
        uint8_t space[96];
        const int64_t left = s.width - 64 * u, own = u - unit;
        const uint8_t *from = u < complete ? source : padded<FORMAT>(source, left < 64 ? left : 64, space);
        store_weights<15 - bits>(
            weights + 64 * own, unpack<FORMAT>(from), whole_scales + 2 * own, whole_biases + 2 * own);
    }
}

/* R unpacked rows times T tokens, over the units of a segment. */
template <int R, int T>
inline void tile(
    const int16_t (*weights)[ROW_PITCH], const float (*worth)[SEGMENT / BLOCK], int64_t begin, int64_t end,
    const Activations *tokens, int first, Lanes (*sums)[TOKENS])
{
    tokens += first;
    Lanes own[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            own[r][t] = sums[r][first + t];
    for (int64_t u = begin; u < end; u += BLOCK) {
        Sums products[R][T];
        dots<R, T>(weights, tokens, u - begin, u, end - u < BLOCK ? end - u : BLOCK, products);
        for (int r = 0; r < R; r++) {
            const Lanes each = factor<false>(worth[r], (u - begin) / BLOCK);
            for (int t = 0; t < T; t++)
                own[r][t] = mul_add(own[r][t], converted(products[r][t]), each);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            sums[r][first + t] = own[r][t];
}

template <int R, int T>
inline int tiles(
    const int16_t (*weights)[ROW_PITCH], const float (*worth)[SEGMENT / BLOCK], int64_t begin, int64_t end,
    const Activations *tokens, int first, int count, Lanes (*sums)[TOKENS])
{
    for (; first + T <= count; first += T)
        tile<R, T>(weights, worth, begin, end, tokens, first, sums);
    return first;
}

/* Up to ROWS rows times up to TOKENS tokens. */
template <int FORMAT, int GROUP>
void rows_of_many(
    const fp_matrix &m, const Shape &s, int64_t row, int rows, const Activations *tokens, int count, float *out,
    int64_t stride)
{
    alignas(64) int16_t weights[ROWS][ROW_PITCH];
    float worth[ROWS][SEGMENT / BLOCK];
    alignas(64) Lanes sums[ROWS][TOKENS];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < count; t++)
            sums[r][t] = none();
    for (int64_t begin = 0; begin < s.units; begin += SEGMENT) {
        const int64_t end = begin + SEGMENT < s.units ? begin + SEGMENT : s.units;
        for (int r = 0; r < rows; r++)
            for (int64_t u = begin; u < end; u += PART)
                unpack_part<FORMAT, GROUP>(
                    m, s, row + r, u, end, weights[r] + 64 * (u - begin), worth[r] + (u - begin) / BLOCK);
        int r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
            int t = tiles<TILE_ROWS, TILE_TOKENS>(weights + r, worth + r, begin, end, tokens, 0, count, sums + r);
            tiles<TILE_ROWS, 1>(weights + r, worth + r, begin, end, tokens, t, count, sums + r);
        }
        for (; r < rows; r++)
            tiles<1, 1>(weights + r, worth + r, begin, end, tokens, 0, count, sums + r);
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < rows; r++)
            out[t * stride + r] = total(sums[r][t]) * tokens[t].scale;
}

} // namespace

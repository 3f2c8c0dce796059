/* Products of rows that are stored as numbers. */

namespace {

/* Rows stored as numbers, in blocks of eight values that go to two sums in turn. R rows times T tokens. */
template <int R, int T>
inline void plain_tile(
    const float *const *weights, const Activations *tokens, int first, int64_t begin, int64_t end,
    Floats (*sums)[TOKENS][2])
{
    Floats own[R][T][2];
    tokens += first;
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++)
                own[r][t][i] = sums[r][first + t][i];
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
        for (int side = 0; side < 2; side++)
            for (int r = 0; r < R; r++) {
                Floats w = load8(weights[r] + i - begin + 8 * side);
                for (int t = 0; t < T; t++)
                    own[r][t][side] = mul_add8(own[r][t][side], w, load8(tokens[t].values + i + 8 * side));
            }
    for (; i < end; i += 8)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) {
                alignas(32) float w[8] = {0}, x[8] = {0};
                int64_t count = end - i < 8 ? end - i : 8;
                memcpy(w, weights[r] + i - begin, count * sizeof(float));
                memcpy(x, tokens[t].values + i, count * sizeof(float));
                own[r][t][0] = mul_add8(own[r][t][0], load8(w), load8(x));
            }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < 2; i++)
                sums[r][first + t][i] = own[r][t][i];
}

void plain_rows(
    const fp_matrix &m, int64_t row, int rows, const Activations *tokens, int count, float *out, int64_t stride)
{
    alignas(64) float space[ROWS][64 * SEGMENT];
    const float *wide[ROWS];
    alignas(64) Floats sums[ROWS][TOKENS][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < count; t++)
            sums[r][t][0] = sums[r][t][1] = none8();
    const int64_t bytes = m.kind == FP_F32 ? 4 : 2;
    for (int64_t begin = 0; begin < m.width; begin += 64 * SEGMENT) {
        const int64_t end = begin + 64 * SEGMENT < m.width ? begin + 64 * SEGMENT : m.width;
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * m.width + begin;
            for (int64_t i = 0; i < (end - begin) * bytes; i += 64)
                prefetch(m.weight + at * bytes + i + AHEAD);
            wide[r] = m.kind == FP_F32 ? (const float *)m.weight + at : space[r];
            if (m.kind != FP_F32)
                widen_numbers(m.weight, m.kind, at, end - begin, space[r]);
        }
        int r = 0;
        for (; r + 4 <= rows; r += 4) {
            int t = 0;
            for (; t + 1 < count && count > 1; t += 2) {
                plain_tile<2, 2>(wide + r, tokens, t, begin, end, sums + r);
                plain_tile<2, 2>(wide + r + 2, tokens, t, begin, end, sums + r + 2);
            }
            for (; t < count; t++)
                plain_tile<4, 1>(wide + r, tokens, t, begin, end, sums + r);
        }
        for (; r < rows; r++)
            for (int t = 0; t < count; t++)
                plain_tile<1, 1>(wide + r, tokens, t, begin, end, sums + r);
    }
    for (int t = 0; t < count; t++)
        for (int r = 0; r < rows; r++)
            out[t * stride + r] = total8(add8(sums[r][t][0], sums[r][t][1]));
}

} // namespace

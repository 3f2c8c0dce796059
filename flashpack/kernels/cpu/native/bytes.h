/* Products of packed rows of 4 bits with several tokens, whose activations are rounded to 8 bits, with a scale for each 64
 * or 32 of them: about twice as many in an instruction as of 16 bits, and an error well below that of 4-bit weights.
 *
 * Rows are taken LANES at a time, one in each lane of a vector: a lane's sums of four products need no sum across the
 * vector, and scales apply to whole vectors. For that, the 32-bit words of these rows are transposed.
 *
 * Primitives beside those of body.h: LANES, BLOCKS (of rows at once), BYTE_TOKENS; Words (32 bits of each row), Row (eight
 * words of one), load_row, transpose(rows) -> words, low_nibbles, high_nibbles, shifted (MXFP4's values, twice, and 12 more);
 * row_of(Strip), lanes_of(Words), multiplied(Lanes, Lanes), in_order(Lanes); byte_dots<MOST, B, T, STEPS> -> Sums, of codes
 * up to MOST.
 */

namespace {

enum { WORDS = 8 /* of a unit of a row */ };

/* A part of LANES rows: unsigned bytes in the order of prepare_bytes, and by group what a byte is worth and a constant. */
struct Part {
    alignas(64) Words codes[PART][2 * WORDS];
    alignas(64) Lanes scales[2 * PART], biases[2 * PART];
};

template <int FORMAT, int GROUP>
inline void unpack_bytes(
    const fp_matrix &m, const Shape &s, int64_t row, int64_t last, int64_t unit, int64_t end, Part &part)
{
    const int64_t group = groups_before(s, unit), groups = groups_before(s, end) - group, all = m.rows * s.groups;
    for (int64_t g = 0; g < groups; g += WORDS) {
        Row scales[LANES], biases[LANES];
        Words columns[WORDS];
        const int64_t some = groups - g < WORDS ? groups - g : WORDS;
        for (int r = 0; r < LANES; r++) {
            const int64_t own = (row + r < last ? row + r : last - 1) * s.groups + group + g;
            scales[r] = row_of(scales_of<FORMAT, GROUP>(m, m.scale_type, own, some, all));
            if (FORMAT != MXFP4)
                biases[r] = row_of(biases_of<GROUP>(m, m.scale_type, own, some, all));
        }
        transpose(scales, columns);
        const float shift = -MXFP4_SHIFT;
        for (int i = 0; i < WORDS; i++) {
            part.scales[g + i] = lanes_of(columns[i]);
            part.biases[g + i] = multiplied(part.scales[g + i], factor<false>(&shift, 0));
        }
        if (FORMAT != MXFP4) {
            transpose(biases, columns);
            for (int i = 0; i < WORDS; i++)
                part.biases[g + i] = lanes_of(columns[i]);
        }
    }
    /* The same place of the rows after these; of their codes below. */
    for (int r = 0; r < LANES; r++)
        prefetch_numbers(m, (row + r + LANES * BLOCKS) * s.groups + group);
    for (int64_t u = unit; u < end; u++) {
        Row rows[LANES];
        Words words[WORDS];
        for (int r = 0; r < LANES; r++) {
            const int64_t own = row + r < last ? row + r : last - 1;
            rows[r] = load_row(m.weight + (own * m.width + 64 * u) / 2, s.width - 64 * u < 64);
            if (u % 2 == 0)
                prefetch(m.weight + ((row + r + LANES * BLOCKS) * m.width + 64 * u) / 2);
        }
        transpose(rows, words);
        for (int i = 0; i < WORDS; i++) {
            const Words low = low_nibbles(words[i]), high = high_nibbles(words[i]);
            part.codes[u - unit][2 * i] = FORMAT == MXFP4 ? shifted(low) : low;
            part.codes[u - unit][2 * i + 1] = FORMAT == MXFP4 ? shifted(high) : high;
        }
    }
}

/* LANES * B rows times T tokens over the units of a part: to sums[block][token]. On its own it has all registers. */
template <int MOST, int GROUP, int B, int T>
__attribute__((noinline)) void byte_tile(
    const Part *parts, int64_t unit, int64_t end, int64_t group, const Activations *tokens, Lanes (*sums)[TOKENS])
{
    constexpr int pieces = GROUP == 32 ? 2 : 1, steps = 2 * WORDS / pieces;
    Lanes own[B][T];
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            own[b][t] = sums[b][t];
    for (int64_t u = unit; u < end; u++)
        for (int piece = 0; piece < pieces; piece++) {
            const Words *codes[B];
            for (int b = 0; b < B; b++)
                codes[b] = parts[b].codes[u - unit] + piece * steps;
            Sums products[B][T];
            byte_dots<MOST, B, T, steps>(codes, tokens, 64 * u + 4 * piece * steps, products);
            const int64_t g = 64 * u / GROUP + piece - group, at = pieces * u + piece;
            for (int b = 0; b < B; b++)
                for (int t = 0; t < T; t++) {
                    const Lanes each = multiplied(parts[b].scales[g], factor<false>(tokens[t].byte_scales, at));
                    own[b][t] = mul_add(own[b][t], converted(products[b][t]), each);
                    /* A group of 128 has its constant once for each of its units. */
                    own[b][t] = mul_add(own[b][t], parts[b].biases[g], factor<false>(tokens[t].byte_sums, at));
                }
        }
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++)
            sums[b][t] = own[b][t];
}

template <int MOST, int GROUP, int B>
inline void byte_tiles(
    const Part *parts, int64_t unit, int64_t end, int64_t group, const Activations *tokens, int count,
    Lanes (*sums)[TOKENS])
{
    typedef Lanes Block[TOKENS];
    int t = 0;
    for (; t + BYTE_TOKENS <= count; t += BYTE_TOKENS)
        byte_tile<MOST, GROUP, B, BYTE_TOKENS>(parts, unit, end, group, tokens + t, (Block *)&sums[0][t]);
    for (; t + 2 <= count; t += 2)
        byte_tile<MOST, GROUP, B, 2>(parts, unit, end, group, tokens + t, (Block *)&sums[0][t]);
    for (; t < count; t++)
        byte_tile<MOST, GROUP, B, 1>(parts, unit, end, group, tokens + t, (Block *)&sums[0][t]);
}

/* Up to LANES * BLOCKS rows times up to TOKENS tokens. */
template <int FORMAT, int GROUP>
void rows_of_bytes(
    const fp_matrix &m, const Shape &s, int64_t row, int64_t last, const Activations *tokens, int count, float *out,
    int64_t stride)
{
    constexpr int most = FORMAT == MXFP4 ? 24 : 15;
    Part parts[BLOCKS];
    alignas(64) Lanes sums[BLOCKS][TOKENS];
    last = last - row < LANES * BLOCKS ? last : row + LANES * BLOCKS;
    const int blocks = (int)((last - row + LANES - 1) / LANES);
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < count; t++)
            sums[b][t] = none();
    for (int64_t unit = 0; unit < s.units; unit += PART) {
        const int64_t end = unit + PART < s.units ? unit + PART : s.units, group = groups_before(s, unit);
        for (int b = 0; b < blocks; b++)
            unpack_bytes<FORMAT, GROUP>(m, s, row + LANES * b, last, unit, end, parts[b]);
        if (blocks == BLOCKS)
            byte_tiles<most, GROUP, BLOCKS>(parts, unit, end, group, tokens, count, sums);
        else
            for (int b = 0; b < blocks; b++)
                byte_tiles<most, GROUP, 1>(parts + b, unit, end, group, tokens, count, sums + b);
    }
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < count; t++) {
            const int64_t first = LANES * b, left = last - row - first;
            const Lanes ordered = in_order(sums[b][t]);
            float *const to = out + t * stride + first;
            if (left >= LANES)
                memcpy(to, &ordered, sizeof ordered); /* of a known size: no call */
            else
                memcpy(to, &ordered, left * sizeof(float));
        }
}

/* Of each eight bytes the even ones, then the odd ones: the order of unpack_bytes. */
inline void even_odd(const uint64_t *in, uint64_t *out)
{
    for (int i = 0; i < 8; i++) {
        uint64_t x = in[i];
        const uint64_t inner = (x ^ (x >> 8)) & 0x0000FF000000FF00;
        x ^= inner ^ (inner << 8); /* 0 2 1 3 4 6 5 7 */
        const uint64_t middle = (x ^ (x >> 16)) & 0x00000000FFFF0000;
        out[i] = x ^ middle ^ (middle << 16);
    }
}

/* Activations as bytes in the order of unpack_bytes. For each unit, or for its halves where groups are of 32: what a byte
 * is worth, and the sum of its values. */
inline void prepare_bytes(const float *x, const Shape &s, int8_t *bytes, float *scales, float *sums)
{
    const int pieces = s.group == 32 ? 2 : 1, each = 64 / pieces;
    for (int64_t u = 0; u < s.units; u++) {
        alignas(64) float values[64], piece_values[64];
        alignas(64) int16_t whole[64];
        alignas(64) int8_t straight[64];
        const float *own = unit_values(x, s, u, values);
        for (int piece = 0; piece < pieces; piece++) {
            int32_t half_sums[2];
            bool finite = true;
            const float *part = own;
            if (pieces > 1) {
                memset(piece_values, 0, sizeof piece_values);
                memcpy(piece_values + each * piece, own + each * piece, each * sizeof(float));
                part = piece_values;
            }
            const float largest = largest64(part, &finite), inverse = 127.0f / largest;
            const bool usable = finite && inverse < INFINITY;
            round64(part, usable ? inverse : 0, whole, half_sums);
            for (int i = each * piece; i < each * (piece + 1); i++)
                straight[i] = (int8_t)whole[i];
            const float scale = finite ? (usable ? largest / 127.0f : 0) : NAN;
            scales[pieces * u + piece] = scale;
            sums[pieces * u + piece] = (float)(half_sums[0] + half_sums[1]) * scale;
        }
        uint64_t in[8], out[8];
        memcpy(in, straight, sizeof in);
        even_odd(in, out);
        memcpy(bytes + 64 * u, out, sizeof out);
    }
}

} // namespace

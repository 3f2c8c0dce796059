/* Products of packed rows with one token, as the codes come: their sums over a unit are exact integers.
 *
 * A row is taken in strips of 16 groups, whose scales and biases are widened together.
 */

namespace {

#if defined(FP_PLANES)
typedef int8_t Fine;
enum { FINE = 128 }; /* of these for a unit */

inline const Fine *fine(const Activations &a)
{
    return a.planes;
}
#else
typedef int16_t Fine;
enum { FINE = 64 };

inline const Fine *fine(const Activations &a)
{
    return a.codes;
}

template <int FORMAT> inline Lanes fine_dot(const uint8_t *unit, const Fine *activations)
{
    return dot(unpack<FORMAT>(unit), activations);
}
#endif

/* R rows times one token over complete units of a strip. */
template <int FORMAT, int GROUP, int R>
inline void units_of_one(
    const uint8_t *weights, int64_t pitch, int64_t units, const Fine *activations, const float (*scales)[16],
    Lanes *sums)
{
    /* The same place of the next rows, at least. */
    const int64_t ahead = 4 * pitch + 2048 > AHEAD ? 4 * pitch + 2048 : AHEAD;
    Lanes own[R];
    for (int r = 0; r < R; r++)
        own[r] = sums[r];
    for (int64_t u = 0; u < units; u++) {
        const uint8_t *unit = weights + u * unit_bytes(FORMAT);
        if (unit_bytes(FORMAT) > 32 || u % (64 / unit_bytes(FORMAT)) == 0)
            for (int r = 0; r < R; r++)
                prefetch(unit + r * pitch + ahead);
        for (int r = 0; r < R; r++) {
            const Lanes products = fine_dot<FORMAT>(unit + r * pitch, activations + FINE * u);
            own[r] = mul_add(own[r], products, factor<GROUP == 32>(scales[r], GROUP == 128 ? u / 2 : u));
        }
    }
    for (int r = 0; r < R; r++)
        sums[r] = own[r];
}

/* R rows times one token. */
template <int FORMAT, int GROUP, int R>
inline void rows_of_one(const fp_matrix &m, const Shape &s, int64_t row, const Activations &a, float *out)
{
    constexpr int64_t strip = GROUP / 4; /* units */
    const int64_t pitch = m.width * unit_bytes(FORMAT) / 64, all = m.rows * s.groups;
    const int64_t number = number_bytes(m);
    const int64_t next = 6 * s.groups * number > SCALES_AHEAD ? 6 * s.groups * number : SCALES_AHEAD;
    const uint8_t *weights = m.weight + row * pitch;
    const int64_t complete = uncopied<FORMAT>(s);
    Lanes sums[R];
    for (int r = 0; r < R; r++)
        sums[r] = none();
    for (int64_t begin = 0; begin < s.units; begin += strip) {
        const int64_t end = begin + strip < s.units ? begin + strip : s.units;
        const int64_t whole = complete < end ? complete : end;
        const int64_t group = 64 * begin / GROUP, count = s.groups - group < 16 ? s.groups - group : 16;
        alignas(64) float scales[R][16];
        for (int r = 0; r < R; r++) {
            const int64_t first = (row + r) * s.groups + group;
            prefetch(m.scales + first * number + next);
            const Strip own_scales = scales_of<FORMAT, GROUP>(m, first, count, all);
            store_strip(scales[r], own_scales);
#if defined(FP_PLANES)
            if (FORMAT == MXFP4)
                sums[r] = add_strip(sums[r], own_scales, multiplied(load_strip(a.sums + group), all_lanes(-MXFP4_SHIFT)));
#endif
            if (FORMAT != MXFP4) {
                prefetch(bias_source(m, first) + next);
                const Strip biases = biases_of<GROUP>(m, first, count, all);
                sums[r] = add_strip(sums[r], biases, load_strip(a.sums + group));
            }
        }
        units_of_one<FORMAT, GROUP, R>(
            weights + begin * unit_bytes(FORMAT), pitch, whole - begin, fine(a) + FINE * begin, scales, sums);
        for (int64_t u = whole > begin ? whole : begin; u < end; u++)
            for (int r = 0; r < R; r++) {
                uint8_t space[96];
                const uint8_t *unit = weights + r * pitch + u * unit_bytes(FORMAT);
                const int64_t left = s.width - 64 * u, own = u - begin;
                const uint8_t *whole_unit = padded<FORMAT>(unit, left < 64 ? left : 64, space);
                const Lanes scale = factor<GROUP == 32>(scales[r], GROUP == 128 ? own / 2 : own);
                sums[r] = mul_add(sums[r], fine_dot<FORMAT>(whole_unit, fine(a) + FINE * u), scale);
            }
    }
    for (int r = 0; r < R; r++)
        out[r] = total(sums[r]) * a.scale;
}

} // namespace

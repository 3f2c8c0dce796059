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

/* COUNT units of R rows times one token: into `sums`. */
template <int FORMAT, int GROUP, int R, int COUNT>
FP_INLINE void some_units(
    const uint8_t *weights, int64_t pitch, int64_t first, const Fine *activations, const float (*scales)[16],
    Lanes *sums)
{
    for (int64_t u = first; u < first + COUNT; u++)
        for (int r = 0; r < R; r++) {
            const uint8_t *unit = weights + r * pitch + u * unit_bytes(FORMAT);
            const Lanes products = fine_dot<FORMAT>(unit, activations + FINE * u);
            sums[r] = mul_add(sums[r], products, factor<GROUP == 32>(scales[r], GROUP == 128 ? u / 2 : u));
        }
}

/* R rows times one token over complete units of a strip. */
template <int FORMAT, int GROUP, int R>
inline void units_of_one(
    const uint8_t *weights, int64_t pitch, int64_t units, const Fine *activations, const float (*scales)[16],
    Lanes *sums)
{
    constexpr int LINE = unit_bytes(FORMAT) > 32 ? 1 : 64 / unit_bytes(FORMAT); /* units */
    /* The same place of the next rows, at least. */
    const uint8_t *ahead = weights + (4 * pitch + 2048 > AHEAD ? 4 * pitch + 2048 : AHEAD);
    Lanes own[R];
    for (int r = 0; r < R; r++)
        own[r] = sums[r];
    int64_t u = 0;
    for (; u + LINE <= units; u += LINE) {
        for (int r = 0; r < R; r++)
            prefetch(ahead + r * pitch + u * unit_bytes(FORMAT));
        some_units<FORMAT, GROUP, R, LINE>(weights, pitch, u, activations, scales, own);
    }
    for (; u < units; u++)
        some_units<FORMAT, GROUP, R, 1>(weights, pitch, u, activations, scales, own);
    for (int r = 0; r < R; r++)
        sums[r] = own[r];
}

/* R rows' numbers for a strip, from number `first` on: scales as float32, and biases times sums of activations, which
 * are added to `sums`. */
template <int FORMAT, int GROUP, int R>
FP_INLINE void numbers_of_one(
    const fp_matrix &m, int type, int64_t first, int64_t groups, int64_t count, int64_t all, const float *group_sums,
    float (*scales)[16], Lanes *sums)
{
    const int64_t number = number_bytes(m.kind, type);
    const int64_t next = 6 * groups * number > SCALES_AHEAD ? 6 * groups * number : SCALES_AHEAD;
    const Strip activations = load_strip(group_sums);
    for (int r = 0; r < R; r++, first += groups) {
        prefetch(m.scales + first * number + next);
        const Strip own = scales_of<FORMAT, GROUP>(m, type, first, count, all);
        store_strip(scales[r], own);
#if defined(FP_PLANES)
        if (FORMAT == MXFP4)
            sums[r] = add_strip(sums[r], own, multiplied(activations, all_lanes(-MXFP4_SHIFT)));
#endif
        if (FORMAT != MXFP4) {
            prefetch(bias_source(m, type, first) + next);
            sums[r] = add_strip(sums[r], biases_of<GROUP>(m, type, first, count, all), activations);
        }
    }
}

/* Rows [first, last), R at a time, times one token; returns the first row that is left. */
template <int FORMAT, int GROUP, int R>
inline int64_t rows_of_one(
    const fp_matrix &m, const Shape &s, int64_t first, int64_t last, const Activations &a, float *out)
{
    constexpr int64_t strip = GROUP / 4; /* units */
    const int64_t pitch = m.width * unit_bytes(FORMAT) / 64, all = m.rows * s.groups;
    const int64_t complete = uncopied<FORMAT>(s);
    int64_t row = first;
    for (; row + R <= last; row += R) {
        const uint8_t *weights = m.weight + row * pitch;
        Lanes sums[R];
        for (int r = 0; r < R; r++)
            sums[r] = none();
        for (int64_t begin = 0; begin < s.units; begin += strip) {
            const int64_t end = begin + strip < s.units ? begin + strip : s.units;
            const int64_t whole = complete < end ? complete : end;
            const int64_t group = 64 * begin / GROUP, count = s.groups - group < 16 ? s.groups - group : 16;
            alignas(64) float scales[R][16];
            const int64_t number = row * s.groups + group, after = number + (R - 1) * s.groups + 16;
            const float *group_sums = a.sums + group;
            /* The compiler knows more in each case: the usual types, and that whole strips can be read. */
            if (after <= all && m.scale_type == FP_BF16)
                numbers_of_one<FORMAT, GROUP, R>(m, FP_BF16, number, s.groups, count, READABLE, group_sums, scales, sums);
            else if (after <= all && m.scale_type == FP_F16)
                numbers_of_one<FORMAT, GROUP, R>(m, FP_F16, number, s.groups, count, READABLE, group_sums, scales, sums);
            else
                numbers_of_one<FORMAT, GROUP, R>(m, m.scale_type, number, s.groups, count, all, group_sums, scales, sums);
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
            out[row - first + r] = total(sums[r]) * a.scale;
    }
    return row;
}

} // namespace

/* What becomes of scales and biases of several units together: in plain C++, for levels without instructions of their
 * own. Needs Strip and MOST_WEIGHT. */

namespace {

/* `count` times factor * 2^(code - 127), NaN for 255, then zeros. */
inline Strip powers_of_two(const uint8_t *codes, int64_t count, float factor)
{
    alignas(64) float values[16] = {0};
    for (int64_t i = 0; i < count; i++)
        values[i] = factor * float_of(blocks::e8m0_bits(codes[i]));
    return load_strip(values);
}

/* Numbers of groups, for each half of a unit. */
template <int GROUP> inline Strip spread(Strip strip)
{
    alignas(64) float groups[16], halves[16];
    store_strip(groups, strip);
    for (int h = 0; h < 16; h++)
        halves[h] = groups[32 * h / GROUP];
    return load_strip(halves);
}

/* A part's scales and biases, each for half a unit, as integers, and what these are worth in each block. */
inline void whole_numbers(
    Strip scales, Strip biases, float most, float one, int16_t *whole_scales, int16_t *whole_biases, float *worth)
{
    enum { HALVES = 2 * BLOCK };
    alignas(64) float wide[16], constant[16];
    store_strip(wide, scales);
    store_strip(constant, biases);
    for (int first = 0; first < 16; first += HALVES) {
        float largest = 0, poison = 0;
        for (int h = first; h < first + HALVES; h++) {
            const float low = fabsf(constant[h]), high = fabsf(constant[h] + wide[h] * most);
            largest = largest > low ? largest : low;
            largest = largest > high ? largest : high;
            poison += wide[h] * 0.0f + constant[h] * 0.0f;
        }
        /* Two less: roundings of scale, bias and product may add up. */
        const float room = MOST_WEIGHT - 2, inverse = poison == 0 && largest > FLT_MIN ? room / largest : 0;
        for (int h = first; h < first + HALVES; h++) {
            whole_scales[h] = (int16_t)(int32_t)rintf(wide[h] * inverse * one);
            whole_biases[h] = (int16_t)(int32_t)rintf(constant[h] * inverse);
        }
        worth[first / HALVES] = largest / room + poison;
    }
}

} // namespace

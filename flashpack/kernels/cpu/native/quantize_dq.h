/* The affine_dq quantizers, operation by operation those of flashpack.formats.affine_dq and affine_dq_starts; included
 * by quantize_body.h, once for each instruction set. Groups have 32 values, blocks 8 groups. */

/* What blocks store: codes of scales and biases, as whole numbers, and (d, c, m). */
typedef struct {
    float s[DQ_GROUPS], b[DQ_GROUPS], numbers[3];
} NAME(block);

/* The sum of a block's eight numbers in the order of lane_sum. */
INLINE double NAME(eight)(const double *x)
{
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE float NAME(eight_floats)(const float *x)
{
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE float NAME(as_bf16)(float value)
{
    uint8_t stored[2];
    return NAME(store_rounded)(value, TYPE_BF16, stored, 0);
}

/* The whole multiple 0 to 15 of `step` that is nearest to `value`; 0 where `step` is 0. */
INLINE float NAME(multiple)(float value, float step)
{
    float code = step == 0 ? 0 : value / step;
    code = code > 0 ? code : 0;
    code = code < 15 ? code : 15;
    return code + ROUNDER - ROUNDER;
}

INLINE float NAME(largest)(const float *values)
{
    float most = values[0];
    int i;
    for (i = 1; i < DQ_GROUPS; i++)
        most = values[i] > most || values[i] != values[i] ? values[i] : most;
    return most;
}

/* encode_groups */
INLINE void NAME(group_codes)(const float *scales, const float *biases, float levels, NAME(block) *block)
{
    const float d = NAME(as_bf16)(NAME(largest)(scales) / 15), half = levels / 2;
    float moved[DQ_GROUPS], turned[DQ_GROUPS], c, m;
    int g;
    for (g = 0; g < DQ_GROUPS; g++) {
        block->s[g] = NAME(multiple)(scales[g], d);
        moved[g] = biases[g] + (scales[g] - block->s[g] * d) * half;
        turned[g] = -moved[g];
    }
    c = NAME(as_bf16)(-NAME(largest)(turned) + 0.0f);
    m = NAME(as_bf16)((NAME(largest)(moved) + 0.0f - c) / 15);
    for (g = 0; g < DQ_GROUPS; g++)
        block->b[g] = NAME(multiple)(moved[g] - c, m);
    block->numbers[0] = d;
    block->numbers[1] = c;
    block->numbers[2] = m;
}

/* The squared error of a group. With `sums`, also the sums of its integers q, of q * q, of what they decode to too
 * much, and of q times that. */
INLINE float NAME(trial)(const float *x, float scale, float bias, float levels, double *sums)
{
    const VECTOR zero = {0}, inverse = zero + (scale == 0 ? 0 : 1 / scale), top = zero + levels;
    const VECTOR scales = zero + scale, biases = zero + bias;
    VECTOR error[STEP] = {{0}}, a[STEP] = {{0}}, b[STEP] = {{0}}, c[STEP] = {{0}}, d[STEP] = {{0}};
    size_t i, k;
    for (i = 0; i < DQ_GROUP; i += 8) {
        for (k = 0; k < STEP; k++) {
            VECTOR value, q, wrong;
            memcpy(&value, x + i + k * LANES, sizeof value);
            q = NAME(clip)((value - biases) * inverse, top) + ROUNDER - ROUNDER;
            wrong = q * scales + biases - value;
            error[k] += wrong * wrong;
            if (sums) {
                a[k] += q;
                b[k] += q * q;
                c[k] += wrong;
                d[k] += q * wrong;
            }
        }
    }
    if (sums) {
        sums[0] = NAME(total)(a);
        sums[1] = NAME(total)(b);
        sums[2] = NAME(total)(c);
        sums[3] = NAME(total)(d);
    }
    return NAME(total)(error);
}

/* The best of a group's codes and those around them. */
INLINE void NAME(neighbours)(const float *x, NAME(block) *block, int g, float levels)
{
    const float d = block->numbers[0], c = block->numbers[1], m = block->numbers[2];
    const float s = block->s[g], b = block->b[g];
    float error = NAME(trial)(x, d * s, c + m * b, levels, NULL);
    int i;
    for (i = 0; i < 9; i++) {
        float near_s = s + (float)(i / 3 - 1), near_b = b + (float)(i % 3 - 1), found;
        if (i == 4)
            continue;
        near_s = near_s < 0 ? 0 : near_s > 15 ? 15 : near_s;
        near_b = near_b < 0 ? 0 : near_b > 15 ? 15 : near_b;
        found = NAME(trial)(x, d * near_s, c + m * near_b, levels, NULL);
        if (found < error) {
            error = found;
            block->s[g] = near_s;
            block->b[g] = near_b;
        }
    }
}

/* The least squares of (d, c, m) for a block's integers, taken if its error becomes smaller. */
INLINE void NAME(refit_block)(const float *x, NAME(block) *block, float levels)
{
    const double n = DQ_GROUP;
    const float *old = block->numbers;
    double t[9][DQ_GROUPS], a11, a12, a13, a22, a23, a33, c11, c12, c13, c22, c23, c33, g1, g2, g3, determinant;
    float before[DQ_GROUPS], after[DQ_GROUPS], moved[3];
    int g;
    for (g = 0; g < DQ_GROUPS; g++) {
        const double s = block->s[g], b = block->b[g];
        double sums[4];
        before[g] = NAME(trial)(x + g * DQ_GROUP, old[0] * block->s[g], old[1] + old[2] * block->b[g], levels, sums);
        t[0][g] = s * s * sums[1];
        t[1][g] = s * sums[0];
        t[2][g] = s * b * sums[0];
        t[3][g] = b;
        t[4][g] = b * b;
        t[5][g] = s * sums[3];
        t[6][g] = sums[2];
        t[7][g] = b * sums[2];
    }
    a11 = NAME(eight)(t[0]);
    a12 = NAME(eight)(t[1]);
    a13 = NAME(eight)(t[2]);
    a22 = n * DQ_GROUPS;
    a23 = n * NAME(eight)(t[3]);
    a33 = n * NAME(eight)(t[4]);
    g1 = NAME(eight)(t[5]);
    g2 = NAME(eight)(t[6]);
    g3 = NAME(eight)(t[7]);
    c11 = a22 * a33 - a23 * a23;
    c12 = a13 * a23 - a12 * a33;
    c13 = a12 * a23 - a13 * a22;
    c22 = a11 * a33 - a13 * a13;
    c23 = a12 * a13 - a11 * a23;
    c33 = a11 * a22 - a12 * a12;
    determinant = a11 * c11 + a12 * c12 + a13 * c13;
    moved[0] = NAME(as_bf16)((float)(old[0] - (c11 * g1 + c12 * g2 + c13 * g3) / determinant));
    moved[1] = NAME(as_bf16)((float)(old[1] - (c12 * g1 + c22 * g2 + c23 * g3) / determinant));
    moved[2] = NAME(as_bf16)((float)(old[2] - (c13 * g1 + c23 * g2 + c33 * g3) / determinant));
    for (g = 0; g < DQ_GROUPS; g++)
        after[g] = NAME(trial)(
            x + g * DQ_GROUP, moved[0] * block->s[g], moved[1] + moved[2] * block->b[g], levels, NULL);
    if (NAME(eight_floats)(after) < NAME(eight_floats)(before))
        memcpy(block->numbers, moved, sizeof moved);
}

/* Codes and numbers of a block found by the search. */
INLINE void NAME(search)(const float *x, const float *low, const float *high, int bits, NAME(block) *block)
{
    const float levels = (float)((1 << bits) - 1);
    float scales[DQ_GROUPS], biases[DQ_GROUPS];
    int g, i;
    for (g = 0; g < DQ_GROUPS; g++) {
        const float middle = low[g] * 0.5f + high[g] * 0.5f;
        float y[DQ_GROUP], scale[2], bias[2], codes[2], sum = NAME(centre)(x + g * DQ_GROUP, DQ_GROUP, middle, y);
        NAME(fits)(y, DQ_GROUP, sum, low[g] - middle, high[g] - middle, bits, 1, 1, 2, scale, bias, codes);
        scales[g] = scale[0] > 0 ? scale[0] : (high[g] - low[g]) / levels;
        biases[g] = scale[0] > 0 ? bias[0] + middle : low[g];
    }
    NAME(group_codes)(scales, biases, levels, block);
    for (i = 0; i < 2; i++) {
        for (g = 0; g < DQ_GROUPS; g++)
            NAME(neighbours)(x + g * DQ_GROUP, block, g, levels);
        NAME(refit_block)(x, block, levels);
    }
}

/* round_values of a block; returns its squared error. */
INLINE float NAME(encode_block)(
    const float *x, const NAME(block) *block, float levels, uint8_t *codes, float *wrong)
{
    float error[DQ_GROUPS];
    int g;
    for (g = 0; g < DQ_GROUPS; g++) {
        const float scale = block->numbers[0] * block->s[g], bias = block->numbers[1] + block->numbers[2] * block->b[g];
        error[g] = NAME(encode)(
            x + g * DQ_GROUP, DQ_GROUP, scale, bias, scale == 0 ? INFINITY : scale, levels, codes + g * DQ_GROUP,
            wrong + g * DQ_GROUP);
    }
    return NAME(eight_floats)(error);
}

TARGET static void NAME(quantize_dq)(
    const uint8_t *source, int source_type, size_t count, int bits, int starts,
    uint8_t *words, uint8_t *scales, uint8_t *blocks, double *sums, size_t apart)
{
    const float levels = (float)((1 << bits) - 1);
    size_t room = count / 8 * (size_t)bits, first, k;
    for (first = 0; first < count; first += DQ_BLOCK) {
        float x[DQ_BLOCK], wrong[DQ_BLOCK], found_wrong[DQ_BLOCK];
        float low[DQ_GROUPS], high[DQ_GROUPS], ranges[DQ_GROUPS], error;
        uint8_t codes[DQ_BLOCK], found_codes[DQ_BLOCK];
        NAME(block) block, found;
        int g;
        NAME(widen)(source, source_type, first, DQ_BLOCK, x);
        for (g = 0; g < DQ_GROUPS; g++) {
            NAME(extremes)(x + g * DQ_GROUP, DQ_GROUP, low + g, high + g);
            ranges[g] = (high[g] - low[g]) / levels;
        }
        NAME(group_codes)(ranges, low, levels, &block);
        error = NAME(encode_block)(x, &block, levels, codes, wrong);
        if (starts) {
            NAME(search)(x, low, high, bits, &found);
            if (NAME(encode_block)(x, &found, levels, found_codes, found_wrong) < error) {
                block = found;
                memcpy(codes, found_codes, sizeof codes);
                memcpy(wrong, found_wrong, sizeof wrong);
            }
        }
        for (g = 0; g < DQ_GROUPS; g++) {
            NAME(pack)(codes + g * DQ_GROUP, DQ_GROUP, bits, words, room);
            words += DQ_GROUP / 8 * bits;
            room -= (size_t)(DQ_GROUP / 8 * bits);
            sums[0] += NAME(squares)(wrong + g * DQ_GROUP, DQ_GROUP);
            sums[1] += NAME(squares)(x + g * DQ_GROUP, DQ_GROUP);
            sums += apart;
            *scales++ = (uint8_t)((int)block.s[g] | (int)block.b[g] << 4);
        }
        for (k = 0; k < 3; k++)
            NAME(store_rounded)(block.numbers[k], TYPE_BF16, blocks, k);
        blocks += 6;
    }
}

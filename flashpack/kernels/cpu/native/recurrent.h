/* The steps of a recurrent layer for one token, once for each instruction set (after decode.h). */

namespace {

/* `TAPS`: their number where it is known, so that loops are vectors. */
template <int TAPS>
inline void weigh(
    const float *x, float *window, const float *filter, const float *bias, int taps, int64_t count, float *out)
{
    taps = TAPS ? TAPS : taps;
    for (int64_t c = 0; c < count; c++) {
        float *own = window + c * taps;
        const float *weights = filter + c * taps;
        float sum = bias ? bias[c] : 0;
        for (int i = 0; i + 1 < taps; i++) {
            const float next = own[i + 1];
            own[i] = next;
            sum += next * weights[i];
        }
        own[taps - 1] = x[c];
        out[c] = sum + x[c] * weights[taps - 1];
    }
}

/* A causal convolution's next result: x [count] enters behind the inputs in `window` [count, taps], whose sums with
 * `filter` [count, taps] (and `bias`, or null) pass silu. */
void convolve(
    const float *x, float *window, const float *filter, const float *bias, int taps, int64_t count, float *out)
{
    if (taps == 4)
        weigh<4>(x, window, filter, bias, taps, count, out);
    else
        weigh<0>(x, window, filter, bias, taps, count, out);
    activate(FP_SILU, 0, out, nullptr, out, count);
}

/* x over its length, times a factor. */
inline void shorten(const float *x, float factor, int width, float *out)
{
    Floats sum = none8();
    for (int i = 0; i < width; i += 8)
        sum = mul_add8(sum, load8(x + i), load8(x + i));
    factor /= sqrtf(total8(sum) + 1e-6f);
    for (int i = 0; i < width; i++)
        out[i] = x[i] * factor;
}

/* The gated delta rule for a value head. Its state fades; the share `beta` of what its answer to the key is off the
 * value is put right; its answer to the query, normalized, times silu(gate), is the result. `mixed`: queries, keys and
 * values of all heads, convolved; beta and alpha are the numbers before their functions.
 *
 * The state is read twice and written once, four rows at a time; the next head's, which follows it, is asked for in the
 * meantime. */
void delta(const fp_delta &d, int head, const float *mixed, const float *gate, float beta, float alpha, float *out)
{
    const int keys = d.key_width, width = d.value_width, key_head = head / (d.value_heads / d.key_heads);
    const int64_t size = (int64_t)keys * width;
    float *state = d.state + head * size;
    const float *value = mixed + 2 * d.key_heads * keys + head * width;
    alignas(64) float query[FP_MAX_HEAD], key[FP_MAX_HEAD], change[FP_MAX_HEAD] = {0}, answer[FP_MAX_HEAD] = {0};
    shorten(mixed + key_head * keys, 1.0f / sqrtf((float)keys), keys, query);
    shorten(mixed + (d.key_heads + key_head) * keys, 1.0f, keys, key);
    const float step = alpha + d.rate_bias[head];
    const float fade = expf(d.rate[head] * (step > 20.0f ? step : log1pf(expf(step))));
    const float share = 1.0f / (1.0f + expf(-beta));
    for (int i = 0; i < keys; i += 4) {
        const float *rows = state + i * width;
        for (int j = 0; j < width; j += 8) {
            prefetch(rows + size + 2 * j);
            Floats sum = load8(change + j);
            for (int r = 0; r < 4; r++)
                sum = mul_add8(sum, load8(rows + r * width + j), all8(key[i + r]));
            store8(change + j, sum);
        }
    }
    for (int j = 0; j < width; j++)
        change[j] = (value[j] - fade * change[j]) * share;
    for (int i = 0; i < keys; i += 4) {
        float *rows = state + i * width;
        for (int j = 0; j < width; j += 8) {
            prefetch(rows + size + 2 * (width + j));
            const Floats own = load8(change + j);
            Floats sum = load8(answer + j);
            for (int r = 0; r < 4; r++) {
                const Floats faded = mul_add8(none8(), load8(rows + r * width + j), all8(fade));
                const Floats now = mul_add8(faded, own, all8(key[i + r]));
                store8(rows + r * width + j, now);
                sum = mul_add8(sum, now, all8(query[i + r]));
            }
            store8(answer + j, sum);
        }
    }
    normalize(answer, d.norm, d.epsilon, width, answer);
    for (int j = 0; j < width; j++)
        out[j] = answer[j] * (gate[j] * sigmoid(gate[j]));
}

} // namespace

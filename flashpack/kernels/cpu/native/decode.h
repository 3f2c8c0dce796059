/* The steps of one token between its products, once for each instruction set (after body.h). */

namespace {

/* x / sqrt(mean of squares + epsilon) * weight (null: 1). `width` is a multiple of 8. */
void normalize(const float *x, const float *weight, float epsilon, int64_t width, float *out)
{
    Floats sums[2] = {none8(), none8()};
    for (int64_t i = 0; i < width; i += 8)
        sums[i / 8 % 2] = mul_add8(sums[i / 8 % 2], load8(x + i), load8(x + i));
    const float factor = 1.0f / sqrtf(total8(add8(sums[0], sums[1])) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i++)
        out[i] = weight ? x[i] * factor * weight[i] : x[i] * factor;
}

/* Rotary positions, by halves: values i and i + rotary / 2 are turned together. */
inline void turn(float *x, int rotary, const float *cosine, const float *sine)
{
    const int half = rotary / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

enum { HEADS_AT_ONCE = 4 };

/* Keys [tokens, width] times H queries [H, width], to scores [H, stride]; results do not depend on H. */
template <int H>
inline void scores_of(const float *queries, const float *keys, int width, int64_t tokens, float *scores, int64_t stride)
{
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2, keys += 2 * width) {
        Floats sums[H][2];
        for (int h = 0; h < H; h++)
            sums[h][0] = sums[h][1] = none8();
        for (int i = 0; i < width; i += 8) {
            const Floats first = load8(keys + i), second = load8(keys + width + i);
            for (int h = 0; h < H; h++) {
                const Floats query = load8(queries + h * width + i);
                sums[h][0] = mul_add8(sums[h][0], query, first);
                sums[h][1] = mul_add8(sums[h][1], query, second);
            }
        }
        for (int h = 0; h < H; h++)
            for (int k = 0; k < 2; k++)
                scores[h * stride + t + k] = total8(sums[h][k]);
    }
    for (int h = 0; t < tokens && h < H; h++) {
        Floats sum = none8();
        for (int i = 0; i < width; i += 8)
            sum = mul_add8(sum, load8(queries + h * width + i), load8(keys + i));
        scores[h * stride + t] = total8(sum);
    }
}

/* Sums [H, width] of values [tokens, width] by weights [H, stride] are added to `out` [H, width]. */
template <int H>
inline void weighted(const float *weights, int64_t stride, const float *values, int width, int64_t tokens, float *out)
{
    for (int i = 0; i < width; i += 8) {
        Floats sums[H];
        for (int h = 0; h < H; h++)
            sums[h] = load8(out + h * width + i);
        for (int64_t t = 0; t < tokens; t++) {
            const Floats value = load8(values + t * width + i);
            for (int h = 0; h < H; h++)
                sums[h] = mul_add8(sums[h], all8(weights[h * stride + t]), value);
        }
        for (int h = 0; h < H; h++)
            store8(out + h * width + i, sums[h]);
    }
}

/* Weights from scores: exponentials over their sum. */
inline void softmax(float *scores, int64_t tokens)
{
    float most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < tokens; t++)
        most = scores[t] > most ? scores[t] : most;
    for (int64_t t = 0; t < tokens; t++)
        scores[t] = exponential(scores[t] - most);
    for (int64_t t = 0; t < tokens; t++)
        sum += scores[t];
    const float inverse = 1.0f / sum;
    for (int64_t t = 0; t < tokens; t++)
        scores[t] *= inverse;
}

/* A KV head and the heads that share it, which read its keys and values together, some tokens at a time.
 * `space`: [heads / kv_heads, position + 1 + width]. */
void attend(
    const fp_attention &a, int kv_head, const float *query, const float *key, const float *value, int64_t position,
    const float *cosine, const float *sine, float *space, float *out)
{
    enum { SOME_TOKENS = 32 };
    const int width = a.width, group = a.heads / a.kv_heads;
    const int64_t tokens = position + 1;
    float *keys = a.keys + kv_head * a.capacity * width, *values = a.values + kv_head * a.capacity * width;
    float *own = keys + position * width, *queries = space + group * tokens;
    if (a.key_norm)
        normalize(key + kv_head * width, a.key_norm, a.epsilon, width, own);
    else
        memcpy(own, key + kv_head * width, width * sizeof(float));
    turn(own, a.rotary, cosine, sine);
    memcpy(values + position * width, value + kv_head * width, width * sizeof(float));
    for (int h = 0; h < group; h++) {
        const float *from = query + (int64_t)(kv_head * group + h) * a.query_stride;
        float *q = queries + h * width;
        if (a.query_norm)
            normalize(from, a.query_norm, a.epsilon, width, q);
        else
            memcpy(q, from, width * sizeof(float));
        turn(q, a.rotary, cosine, sine);
        for (int i = 0; i < width; i++)
            q[i] *= a.scale;
    }
    for (int64_t t = 0; t < tokens; t += SOME_TOKENS) {
        const int64_t some = tokens - t < SOME_TOKENS ? tokens - t : SOME_TOKENS;
        int h = 0;
        for (; h + HEADS_AT_ONCE <= group; h += HEADS_AT_ONCE)
            scores_of<HEADS_AT_ONCE>(queries + h * width, keys + t * width, width, some, space + h * tokens + t, tokens);
        for (; h < group; h++)
            scores_of<1>(queries + h * width, keys + t * width, width, some, space + h * tokens + t, tokens);
    }
    for (int h = 0; h < group; h++)
        softmax(space + h * tokens, tokens);
    float *results = out + (int64_t)kv_head * group * width;
    memset(results, 0, group * width * sizeof(float));
    for (int64_t t = 0; t < tokens; t += SOME_TOKENS) {
        const int64_t some = tokens - t < SOME_TOKENS ? tokens - t : SOME_TOKENS;
        const float *rows = values + t * width;
        int h = 0;
        for (; h + HEADS_AT_ONCE <= group; h += HEADS_AT_ONCE)
            weighted<HEADS_AT_ONCE>(space + h * tokens + t, tokens, rows, width, some, results + h * width);
        for (; h < group; h++)
            weighted<1>(space + h * tokens + t, tokens, rows, width, some, results + h * width);
    }
    for (int h = 0; a.gate && h < group; h++) {
        const float *gate = query + (int64_t)(kv_head * group + h) * a.query_stride + a.gate;
        for (int i = 0; i < width; i++)
            results[h * width + i] *= sigmoid(gate[i]);
    }
}

} // namespace

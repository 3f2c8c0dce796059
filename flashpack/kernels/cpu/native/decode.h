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

inline float product_of(const float *a, const float *b, int width)
{
    Floats sums[2] = {none8(), none8()};
    for (int i = 0; i < width; i += 8)
        sums[i / 8 % 2] = mul_add8(sums[i / 8 % 2], load8(a + i), load8(b + i));
    return total8(add8(sums[0], sums[1]));
}

/* A KV head and the heads that share it. `scores`: [heads / kv_heads, position + 1]. */
void attend(
    const fp_attention &a, int kv_head, const float *query, const float *key, const float *value, int64_t position,
    const float *cosine, const float *sine, float *scores, float *out)
{
    const int width = a.width, group = a.heads / a.kv_heads;
    const int64_t tokens = position + 1;
    float *keys = a.keys + kv_head * a.capacity * width, *values = a.values + kv_head * a.capacity * width;
    float *own = keys + position * width;
    if (a.key_norm)
        normalize(key + kv_head * width, a.key_norm, a.epsilon, width, own);
    else
        memcpy(own, key + kv_head * width, width * sizeof(float));
    turn(own, a.rotary, cosine, sine);
    memcpy(values + position * width, value + kv_head * width, width * sizeof(float));
    for (int h = 0; h < group; h++) {
        const float *from = query + (int64_t)(kv_head * group + h) * a.query_stride;
        float *result = out + (int64_t)(kv_head * group + h) * width, *score = scores + h * tokens;
        alignas(64) float q[FP_MAX_HEAD];
        if (a.query_norm)
            normalize(from, a.query_norm, a.epsilon, width, q);
        else
            memcpy(q, from, width * sizeof(float));
        turn(q, a.rotary, cosine, sine);
        for (int i = 0; i < width; i++)
            q[i] *= a.scale;
        float most = -INFINITY;
        for (int64_t t = 0; t < tokens; t++) {
            score[t] = product_of(q, keys + t * width, width);
            most = score[t] > most ? score[t] : most;
        }
        for (int64_t t = 0; t < tokens; t++)
            score[t] = exponential(score[t] - most);
        float sum = 0;
        for (int64_t t = 0; t < tokens; t++)
            sum += score[t];
        alignas(64) float total[FP_MAX_HEAD] = {0};
        for (int64_t t = 0; t < tokens; t++) {
            const float *v = values + t * width;
            for (int i = 0; i < width; i++)
                total[i] += score[t] * v[i];
        }
        for (int i = 0; i < width; i++)
            result[i] = total[i] / sum;
        if (a.gate)
            for (int i = 0; i < width; i++)
                result[i] *= sigmoid(from[a.gate + i]);
    }
}

} // namespace

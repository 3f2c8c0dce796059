/* The steps of one token between its products, and sequences of steps. */
#include <chrono>

#include "workers.h"

/* x [width] += y (null: nothing), then out = x normalized (normalize in decode.h). */
static void add_norm(
    void *workers, float *x, const float *y, const float *weight, float epsilon, int64_t width, float *out)
{
    for (int64_t i = 0; y && i < width; i++)
        x[i] += y[i];
    static_cast<Workers *>(workers)->level->normalize(x, weight, epsilon, width, out);
}

/* One token's attention: query [heads, query_stride], key and value [kv_heads, width], cosine and sine [rotary] of its
 * position -> out [heads, width]; its key and value are kept. Returns as flashpack_linear. */
static int attend(
    void *workers, const fp_attention *attention, const float *query, const float *key, const float *value,
    int64_t position, const float *cosine, const float *sine, float *out)
{
    Workers &w = *static_cast<Workers *>(workers);
    const fp_attention &a = *attention;
    if (position < 0 || position >= a.capacity || a.width % 8 || a.width < 8 || a.width > FP_MAX_HEAD || a.rotary % 2 ||
        a.rotary > a.width || a.kv_heads < 1 || a.heads % a.kv_heads)
        return -1;
    std::lock_guard<std::mutex> hold(w.pool.callers);
    try {
        w.scratch.reset();
        float *space = w.scratch.take<float>(a.heads * (position + 1 + a.width));
        const int64_t own = a.heads / a.kv_heads * (position + 1 + a.width);
        w.pool.run(a.kv_heads, [&](int64_t i) {
            w.level->attend(a, (int)i, query, key, value, position, cosine, sine, space + i * own, out);
        });
    } catch (const std::bad_alloc &) {
        return -2;
    }
    return 0;
}

/* The `top_k` largest of a router's logits [experts], largest first (the first of equals first), with their weights.
 *
 * FP_SOFTMAX_TOP: softmax over all, divided by the sum of the chosen if `divide`. FP_TOP_SOFTMAX: softmax over the
 * chosen. FP_SIGMOID_TOP: chosen by sigmoid plus `bias` (null: 0), weights without it, divided if `divide`. All times
 * `factor`. */
static int route(
    const float *logits, const float *bias, int experts, int top_k, int mode, int divide, float factor, int32_t *chosen,
    float *weights)
{
    enum { MOST = 4096 };
    if (experts < 1 || experts > MOST || top_k < 1 || top_k > experts)
        return -1;
    float scores[MOST], values[MOST];
    float most = logits[0], sum = 0;
    for (int e = 1; e < experts; e++)
        most = logits[e] > most ? logits[e] : most;
    for (int e = 0; e < experts; e++) {
        values[e] = mode == FP_SIGMOID_TOP ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - most);
        sum += values[e];
        scores[e] = mode == FP_SIGMOID_TOP ? values[e] + (bias ? bias[e] : 0.0f) : logits[e];
    }
    for (int k = 0; k < top_k; k++) {
        int best = -1;
        for (int e = 0; e < experts; e++)
            if (scores[e] == scores[e] && scores[e] > -INFINITY && (best < 0 || scores[e] > scores[best]))
                best = e;
        if (best < 0)
            return -1;
        chosen[k] = best;
        weights[k] = values[best];
        scores[best] = -INFINITY;
    }
    if (mode == FP_SIGMOID_TOP || divide || mode == FP_TOP_SOFTMAX) {
        float total = 0;
        for (int k = 0; k < top_k; k++)
            total += weights[k];
        sum = mode == FP_SIGMOID_TOP ? (divide ? total + 1e-20f : 1.0f) : total;
    }
    for (int k = 0; k < top_k; k++)
        weights[k] = weights[k] / sum * factor;
    return 0;
}

/* A token of a gated delta layer. By key heads, at the layer's strides: query and key, the values and gates of its value
 * heads, and their betas and alphas -> out [value_heads, value_width]. Returns as flashpack_linear. */
static int delta(
    void *workers, const fp_delta *layer, const float *query, const float *key, const float *value, const float *gate,
    const float *beta, const float *alpha, float *out)
{
    Workers &w = *static_cast<Workers *>(workers);
    const fp_delta &d = *layer;
    if (d.key_heads < 1 || d.value_heads < 1 || d.value_heads % d.key_heads || d.taps < 1 || d.key_width < 8 ||
        d.key_width % 8 || d.key_width > FP_MAX_HEAD || d.value_width < 8 || d.value_width % 8 ||
        d.value_width > FP_MAX_HEAD)
        return -1;
    const int32_t group = d.value_heads / d.key_heads;
    const int64_t keys = (int64_t)d.key_heads * d.key_width, own = (int64_t)group * d.value_width;
    std::lock_guard<std::mutex> hold(w.pool.callers);
    try {
        w.scratch.reset();
        float *mixed = w.scratch.take<float>(2 * keys + d.key_heads * own);
        const auto convolve = [&](const float *x, int64_t first, int64_t count) {
            w.level->convolve(
                x, d.window + first * d.taps, d.filter + first * d.taps, d.filter_bias ? d.filter_bias + first : nullptr,
                d.taps, count, mixed + first);
        };
        w.pool.run(d.key_heads, [&](int64_t i) {
            convolve(query + i * d.key_stride, i * d.key_width, d.key_width);
            convolve(key + i * d.key_stride, keys + i * d.key_width, d.key_width);
            convolve(value + i * d.value_stride, 2 * keys + i * own, own);
        });
        w.pool.run(d.value_heads, [&](int64_t i) {
            const int64_t of = i / group, place = i % group, number = of * d.number_stride + place;
            w.level->delta(
                d, (int)i, mixed, gate + of * d.value_stride + place * d.value_width, beta[number], alpha[number],
                out + i * d.value_width);
        });
    } catch (const std::bad_alloc &) {
        return -2;
    }
    return 0;
}

static float number(const uint8_t *numbers, int type, int64_t i)
{
    if (type == FP_F32)
        return reinterpret_cast<const float *>(numbers)[i];
    const uint16_t word = reinterpret_cast<const word16 *>(numbers)[i];
    return type == FP_BF16 ? float_of((uint32_t)word << 16) : half_to_float(word);
}

/* A row of a matrix of plain numbers, or an affine one with scales of such -> out [width]. Returns as flashpack_linear. */
static int row(const fp_matrix &m, int64_t index, float *out)
{
    if (index < 0 || index >= m.rows || !m.weight || m.kind > FP_AFFINE)
        return -1;
    const int64_t first = index * m.width;
    if (m.kind != FP_AFFINE) {
        for (int64_t i = 0; i < m.width; i++)
            out[i] = number(m.weight, m.kind, first + i);
        return 0;
    }
    if (m.scale_type > FP_F32 || m.bits < 2 || m.bits > 8 || m.group < 32 || m.width % m.group)
        return -1;
    const uint8_t *codes = m.weight + first / 8 * m.bits;
    const uint32_t mask = (1u << m.bits) - 1;
    for (int64_t i = 0; i < m.width; i++) {
        const int64_t bit = i * m.bits, group = (first + i) / m.group;
        uint32_t word = codes[bit / 8];
        if (bit % 8 + m.bits > 8)
            word |= (uint32_t)codes[bit / 8 + 1] << 8;
        const float code = (float)(word >> bit % 8 & mask);
        out[i] = code * number(m.scales, m.scale_type, group) + number(m.biases, m.scale_type, group);
    }
    return 0;
}

/* The experts that a router has chosen, if all of them are in memory, and the networks beside them: `outputs` of these,
 * then of those, and their weighted sum -> out (null: none). Returns as flashpack_linear, -3 if an expert is not there. */
static int resident(
    void *workers, fp_resident *layer, const float *x, const int32_t *chosen, const float *weights, float *outputs,
    float *out)
{
    enum { MOST = FP_MOST_RESIDENT };
    fp_resident &l = *layer;
    const int32_t count = l.beside_count + l.top_k;
    if (l.beside_count < 0 || l.top_k < 0 || count < 1 || count > MOST)
        return -1;
    const fp_expert *experts[MOST];
    int32_t counts[MOST], rows[MOST], places[MOST];
    for (int32_t i = 0; i < count; i++) {
        const int32_t number = i < l.beside_count ? 0 : chosen[i - l.beside_count];
        if (number < 0 || (i >= l.beside_count && number >= l.count))
            return -1;
        experts[i] = i < l.beside_count ? l.beside[i] : l.experts[number];
        if (!experts[i])
            return -3;
        counts[i] = 1;
        rows[i] = 0;
        places[i] = (l.beside_count + i) % count; /* weights begin with those of the chosen */
    }
    const auto begun = std::chrono::steady_clock::now();
    const int status = flashpack_experts(workers, x, 1, experts, counts, count, rows, l.function, l.limit, outputs);
    if (!status && out)
        flashpack_combine(workers, outputs, places, weights, 1, count, experts[0]->first.width, out);
    l.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    return status;
}

/* `count` calls one after the other. Returns 0, or of the first that failed: 4 times its place, counted from 1, minus what
 * it returned. */
FP_EXPORT int flashpack_run(void *workers, const fp_step *const *steps, int count)
{
    for (int i = 0; i < count; i++) {
        const fp_step &step = *steps[i];
        void *const *p = step.pointers;
        const int64_t *n = step.numbers;
        const auto real = [&](int at) { return static_cast<const float *>(p[at]); };
        const auto out = [&](int at) { return static_cast<float *>(p[at]); };
        int status = 0;
        switch (step.function) {
        case FP_LINEAR:
            status = flashpack_linear(
                workers, real(0), 1, static_cast<const fp_matrix *>(p[1]), (int)n[0], static_cast<float *const *>(p[2]));
            break;
        case FP_ADD_NORM:
            add_norm(workers, out(0), real(1), real(2), step.real, n[0], out(3));
            break;
        case FP_ATTEND:
            status = attend(
                workers, static_cast<const fp_attention *>(p[0]), real(1), real(2), real(3), n[0], real(4), real(5),
                out(6));
            break;
        case FP_DELTA:
            status = delta(
                workers, static_cast<const fp_delta *>(p[0]), real(1), real(2), real(3), real(4), real(5), real(6),
                out(7));
            break;
        case FP_ROUTE:
            status = route(
                real(0), real(1), (int)n[0], (int)n[1], (int)n[2], (int)n[3], step.real,
                static_cast<int32_t *>(p[2]), out(3));
            break;
        case FP_COMBINE:
            flashpack_combine(
                workers, real(0), static_cast<const int32_t *>(p[1]), real(2), 1, n[0], n[1], out(3));
            break;
        case FP_RESIDENT:
            status = resident(
                workers, static_cast<fp_resident *>(p[0]), real(1), static_cast<const int32_t *>(p[2]), real(3), out(4),
                out(5));
            break;
        case FP_ROW:
            status = row(*static_cast<const fp_matrix *>(p[0]), n[0], out(1));
            break;
        default:
            status = -1;
        }
        if (status)
            return 4 * (i + 1) - status;
    }
    return 0;
}

/* The compute kernels behind a plain C interface: threads, working memory, and the choice of an instruction set. */
#include "workers.h"

#define FP_ABI 6 /* goes up when anything in kernels.h or below changes; the loader compares it with its own */

namespace {

const Level *const levels[] = {
    &level_portable,
#if defined(__x86_64__)
    &level_avx2,
    &level_avx512,
#elif defined(__aarch64__)
    &level_neon,
#endif
};

int best_level()
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
#elif defined(__aarch64__)
    return 1;
#else
    return 0;
#endif
}

bool packed(const fp_matrix &m)
{
    return m.kind == FP_AFFINE || m.kind == FP_MXFP4;
}

Shape shape_of(const fp_matrix &m)
{
    Shape s = {m.width, (m.width + 63) / 64, 0, 0, ORDER_STRAIGHT, false};
    if (packed(m)) {
        s.group = m.group;
        s.groups = m.width / m.group;
        s.order = m.kind == FP_MXFP4 || m.bits == 4 ? ORDER_NIBBLES : m.bits == 2 ? ORDER_PAIRS : ORDER_STRAIGHT;
        s.coarse = m.coarse && s.order == ORDER_NIBBLES;
    }
    return s;
}

bool valid(const fp_matrix &m)
{
    if (m.rows < 0 || m.width < 1 || !m.weight)
        return false;
    if (m.kind == FP_MXFP4)
        return m.group == 32 && m.width % 32 == 0 && m.scales;
    if (m.kind == FP_AFFINE)
        return (m.group == 32 || m.group == 64 || m.group == 128) && m.width % m.group == 0 && m.scales && m.biases &&
               m.bits >= 2 && m.bits <= 8 && m.bits != 7 &&
               (m.scale_type == FP_NIBBLES ? m.group == 32 && m.rows * m.width % 256 == 0
                                           : m.scale_type >= FP_BF16 && m.scale_type <= FP_F32);
    return m.kind >= FP_BF16 && m.kind <= FP_F32;
}

/* Whether tokens are multiplied few at a time, or many, or now so and now so. */
struct Uses {
    bool few, many;
};

/* Activations of several tokens in the form that matrices of one shape need. */
struct Prepared {
    Shape shape;
    int64_t groups = 0;
    int16_t *codes = nullptr;
    int8_t *planes = nullptr;
    float *scales = nullptr, *sums = nullptr;
    int8_t *bytes = nullptr;
    float *byte_scales = nullptr, *byte_sums = nullptr;

    Prepared(const Level &level, Scratch &scratch, const Shape &s, int64_t tokens, Uses uses)
        : shape(s), groups((s.groups + 15) / 16 * 16)
    {
        if (!s.group)
            return;
        const bool as_bytes = uses.many && level.prepare_bytes && s.coarse;
        if ((uses.many && !as_bytes) || (uses.few && !level.planes))
            codes = scratch.take<int16_t>(64 * s.units * tokens);
        if (uses.few && level.planes)
            planes = scratch.take<int8_t>(128 * s.units * tokens);
        if (codes || planes) {
            scales = scratch.take<float>(tokens);
            sums = scratch.take<float>(groups * tokens);
        }
        if (as_bytes) {
            bytes = scratch.take<int8_t>(64 * s.units * tokens);
            byte_scales = scratch.take<float>(2 * s.units * tokens);
            byte_sums = scratch.take<float>(2 * s.units * tokens);
        }
    }

    bool fits(const Shape &s) const
    {
        return s.width == shape.width && s.group == shape.group &&
               (!s.group || (s.order == shape.order && s.coarse == shape.coarse));
    }

    void fill(const Level &level, const float *x, int64_t token) const
    {
        if (codes || planes)
            scales[token] = level.prepare(
                x, shape, codes ? codes + 64 * shape.units * token : nullptr,
                planes ? planes + 128 * shape.units * token : nullptr, sums + groups * token);
        if (bytes)
            level.prepare_bytes(
                x, shape, bytes + 64 * shape.units * token, byte_scales + 2 * shape.units * token,
                byte_sums + 2 * shape.units * token);
    }

    Activations at(const float *x, int64_t token) const
    {
        if (!shape.group)
            return {x, nullptr, nullptr, nullptr, 1, nullptr, nullptr, nullptr};
        return {
            x, codes ? codes + 64 * shape.units * token : nullptr, planes ? planes + 128 * shape.units * token : nullptr,
            sums ? sums + groups * token : nullptr, scales ? scales[token] : 0,
            bytes ? bytes + 64 * shape.units * token : nullptr, bytes ? byte_scales + 2 * shape.units * token : nullptr,
            bytes ? byte_sums + 2 * shape.units * token : nullptr};
    }
};

const Prepared &find(const std::vector<Prepared> &all, const Shape &shape)
{
    size_t i = 0;
    while (!all[i].fits(shape))
        i++;
    return all[i];
}

void add_shape(std::vector<Prepared> &all, Workers &w, const Shape &shape, int64_t tokens, Uses uses)
{
    for (const Prepared &one : all)
        if (one.fits(shape))
            return;
    all.push_back(Prepared(*w.level, w.scratch, shape, tokens, uses));
}

/* Rows of a piece of work: enough to be worth a thread's while, few enough for equal shares; whole blocks of any level. */
int64_t piece_rows(int64_t width)
{
    enum { BLOCK_ROWS = 32 };
    const int64_t wanted = (1 << 16) / width / BLOCK_ROWS * BLOCK_ROWS; /* 32 KiB of 4 bits */
    return wanted < BLOCK_ROWS ? BLOCK_ROWS : wanted;
}

struct Piece {
    int32_t owner; /* matrix or expert */
    int32_t first, last;
};

/* An expert's share of a call: which rows of x it gets, and where its results go. */
struct Task {
    const fp_expert *expert;
    const int32_t *tokens;
    int32_t count;
    float *out;
};

/* Experts' networks for as many tokens as fit into working memory. */
void some_experts(
    Workers &w, const float *x, int64_t tokens, const Task *tasks, int count, int function, float limit)
{
    const Level &level = *w.level;
    std::vector<Prepared> inputs, middles;
    std::vector<int64_t> starts(count + 1, 0);
    Uses uses = {false, false};
    for (int e = 0; e < count; e++) {
        starts[e + 1] = starts[e] + tasks[e].count;
        /* Gate and up take TOKENS at once: what is left of them may be few. */
        const int32_t rest = tasks[e].count % TOKENS;
        uses.few |= rest && rest <= FEW_TOKENS;
        uses.many |= tasks[e].count > FEW_TOKENS;
    }
    const int64_t pairs = starts[count];
    int64_t inner = 0;
    for (int e = 0; e < count; e++) {
        const fp_expert &expert = *tasks[e].expert;
        add_shape(inputs, w, shape_of(expert.first), tokens, uses);
        if (expert.gated == 2)
            add_shape(inputs, w, shape_of(expert.second), tokens, uses);
        add_shape(middles, w, shape_of(expert.down), pairs, uses);
        inner = expert.down.width > inner ? expert.down.width : inner;
    }
    const int64_t width = tasks[0].expert->first.width;
    float *hidden = w.scratch.take<float>(pairs * inner);
    Activations *first = w.scratch.take<Activations>(pairs), *second = w.scratch.take<Activations>(pairs);
    Activations *middle = w.scratch.take<Activations>(pairs);

    w.pool.run(tokens, [&](int64_t t) {
        for (const Prepared &one : inputs)
            one.fill(level, x + t * width, t);
    });
    std::vector<Piece> pieces, down_pieces;
    for (int e = 0; e < count; e++) {
        const fp_expert &expert = *tasks[e].expert;
        for (int32_t i = 0; i < tasks[e].count; i++) {
            const int32_t t = tasks[e].tokens[i];
            first[starts[e] + i] = find(inputs, shape_of(expert.first)).at(x + t * width, t);
            if (expert.gated == 2)
                second[starts[e] + i] = find(inputs, shape_of(expert.second)).at(x + t * width, t);
        }
        int64_t step = piece_rows(width);
        for (int64_t r = 0; r < expert.down.width; r += step)
            pieces.push_back({e, (int32_t)r, (int32_t)(r + step < expert.down.width ? r + step : expert.down.width)});
        step = piece_rows(expert.down.width);
        for (int64_t r = 0; r < expert.down.rows; r += step)
            down_pieces.push_back({e, (int32_t)r, (int32_t)(r + step < expert.down.rows ? r + step : expert.down.rows)});
    }
    w.pool.run((int64_t)pieces.size(), [&](int64_t i) {
        const Piece piece = pieces[i];
        const fp_expert &expert = *tasks[piece.owner].expert;
        const int32_t total = tasks[piece.owner].count;
        const int64_t rows = expert.down.width;
        enum { STEP = 32 };
        for (int64_t row = piece.first; row < piece.last; row += STEP) {
            const int64_t end = row + STEP < piece.last ? row + STEP : piece.last;
            for (int32_t t = 0; t < total; t += TOKENS) {
                const int64_t some = total - t < TOKENS ? total - t : TOKENS;
                const Activations *a = first + starts[piece.owner] + t, *b = second + starts[piece.owner] + t;
                float gate[TOKENS][STEP], up[TOKENS][STEP];
                level.product(expert.first, shape_of(expert.first), row, end, a, some, gate[0], STEP);
                if (expert.gated == 1)
                    level.product(expert.first, shape_of(expert.first), rows + row, rows + end, a, some, up[0], STEP);
                else if (expert.gated)
                    level.product(expert.second, shape_of(expert.second), row, end, b, some, up[0], STEP);
                for (int64_t k = 0; k < some; k++)
                    level.activate(
                        function, limit, gate[k], expert.gated ? up[k] : nullptr,
                        hidden + (starts[piece.owner] + t + k) * inner + row, end - row);
            }
        }
    });
    std::vector<int32_t> owners(pairs);
    for (int e = 0; e < count; e++)
        for (int64_t i = starts[e]; i < starts[e + 1]; i++)
            owners[i] = e;
    w.pool.run(pairs, [&](int64_t i) {
        const Prepared &one = find(middles, shape_of(tasks[owners[i]].expert->down));
        one.fill(level, hidden + i * inner, i);
        middle[i] = one.at(hidden + i * inner, i);
    });
    w.pool.run((int64_t)down_pieces.size(), [&](int64_t i) {
        const Piece piece = down_pieces[i];
        const fp_expert &expert = *tasks[piece.owner].expert;
        const int32_t total = tasks[piece.owner].count;
        level.product(
            expert.down, shape_of(expert.down), piece.first, piece.last, middle + starts[piece.owner], total,
            tasks[piece.owner].out + piece.first, expert.down.rows);
    });
}

} // namespace

FP_EXPORT int flashpack_kernels_abi(void)
{
    return FP_ABI;
}

/* The number of the best instruction set that the processor has. */
FP_EXPORT int flashpack_kernels_level(void)
{
    return best_level();
}

FP_EXPORT const char *flashpack_kernels_level_name(int level)
{
    return level < 0 || level > best_level() ? "" : levels[level]->name;
}

/* `threads` threads for the calls below, the caller's among them; null for another level, or without memory. Never freed. */
FP_EXPORT void *flashpack_workers(int threads, int level)
{
    if (level < 0 || level > best_level())
        return nullptr;
    try {
        return new Workers(threads, levels[level]);
    } catch (...) {
        return nullptr;
    }
}

/* x [tokens, width] times the transposes of `count` matrices of that width: out[i] [tokens, rows of matrix i].
 * Returns 0, -1 if an argument is out of range, -2 without memory. */
FP_EXPORT int flashpack_linear(
    void *workers, const float *x, int64_t tokens, const fp_matrix *matrices, int count, float *const *out)
{
    Workers &w = *static_cast<Workers *>(workers);
    for (int i = 0; i < count; i++)
        if (!valid(matrices[i]) || matrices[i].width != matrices[0].width)
            return -1;
    std::lock_guard<std::mutex> hold(w.pool.callers);
    try {
        w.scratch.reset();
        const int64_t width = matrices[0].width;
        std::vector<Prepared> inputs;
        std::vector<Piece> pieces;
        std::vector<Activations *> activations(count);
        for (int i = 0; i < count; i++) {
            add_shape(inputs, w, shape_of(matrices[i]), tokens, {tokens <= FEW_TOKENS, tokens > FEW_TOKENS});
            const int64_t step = piece_rows(width);
            for (int64_t r = 0; r < matrices[i].rows; r += step)
                pieces.push_back({i, (int32_t)r, (int32_t)(r + step < matrices[i].rows ? r + step : matrices[i].rows)});
        }
        w.pool.run(tokens, [&](int64_t t) {
            for (const Prepared &one : inputs)
                one.fill(*w.level, x + t * width, t);
        });
        for (int i = 0; i < count; i++) {
            activations[i] = w.scratch.take<Activations>(tokens);
            for (int64_t t = 0; t < tokens; t++)
                activations[i][t] = find(inputs, shape_of(matrices[i])).at(x + t * width, t);
        }
        w.pool.run((int64_t)pieces.size(), [&](int64_t i) {
            const Piece piece = pieces[i];
            const fp_matrix &m = matrices[piece.owner];
            w.level->product(
                m, shape_of(m), piece.first, piece.last, activations[piece.owner], tokens, out[piece.owner] + piece.first,
                m.rows);
        });
    } catch (const std::bad_alloc &) {
        return -2;
    }
    return 0;
}

/* Networks of `count` experts, all of x's width: the first gets the rows of x [tokens, width] that the first counts[0]
 * entries of `rows` name, and so on; out [sum of counts, width], in this order. Returns as flashpack_linear. */
FP_EXPORT int flashpack_experts(
    void *workers, const float *x, int64_t tokens, const fp_expert *const *experts, const int32_t *counts, int count,
    const int32_t *rows, int function, float limit, float *out)
{
    enum { PAIRS = 1024 }; /* at once, or one expert's */
    Workers &w = *static_cast<Workers *>(workers);
    try {
        std::vector<Task> tasks;
        for (int e = 0; e < count; e++) {
            const fp_expert &expert = *experts[e];
            const int64_t first_rows = (expert.gated == 1 ? 2 : 1) * expert.down.width;
            if (!valid(expert.first) || !valid(expert.down) || expert.first.width != experts[0]->first.width ||
                expert.first.rows != first_rows || expert.down.rows != expert.first.width ||
                (expert.gated == 2 && (!valid(expert.second) || expert.second.rows != first_rows ||
                                       expert.second.width != expert.first.width)))
                return -1;
            for (int32_t i = 0; i < counts[e]; i++)
                if (rows[i] < 0 || rows[i] >= tokens)
                    return -1;
            tasks.push_back({&expert, rows, counts[e], out});
            rows += counts[e];
            out += counts[e] * expert.first.width;
        }
        std::lock_guard<std::mutex> hold(w.pool.callers);
        for (int from = 0, to; from < count; from = to) {
            int64_t pairs = 0;
            for (to = from; to < count && (to == from || pairs + tasks[to].count <= PAIRS); to++)
                pairs += tasks[to].count;
            w.scratch.reset();
            some_experts(w, x, tokens, &tasks[from], to - from, function, limit);
        }
    } catch (const std::bad_alloc &) {
        return -2;
    }
    return 0;
}

/* out [tokens, width] = sums over k, in order, of rows of `outputs` times weights [tokens, top_k]; places [tokens, top_k]
 * says which row, a negative one none. */
FP_EXPORT void flashpack_combine(
    void *workers, const float *outputs, const int32_t *places, const float *weights, int64_t tokens, int64_t top_k,
    int64_t width, float *out)
{
    Workers &w = *static_cast<Workers *>(workers);
    std::lock_guard<std::mutex> hold(w.pool.callers);
    w.pool.run(tokens, [&](int64_t t) {
        float *const to = out + t * width;
        memset(to, 0, width * sizeof(float));
        for (int64_t k = 0; k < top_k; k++) {
            const int32_t place = places[t * top_k + k];
            const float weight = weights[t * top_k + k];
            const float *const own = outputs + place * width;
            for (int64_t i = 0; place >= 0 && i < width; i++)
                to[i] += own[i] * weight;
        }
    });
}

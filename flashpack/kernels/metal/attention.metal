// Attention of one token, in two kernels. `attend_H`: a threadgroup takes a block of the context's tokens and up to H
// heads that share a KV head, and leaves the block's share of their results in `partial`; so a long context keeps many
// threadgroups busy, and needs no more threadgroup memory than a short one. `attend_merge` adds the shares up.
//
// The token's own key and value belong to the last block. Nobody reads them from the cache in this launch: every SIMD
// group that needs the key computes it, and the threadgroup of a KV head's first heads writes it for tokens to come.

#include "sums.metal"

struct Attention {
    uint capacity; // of the cache, in tokens
    uint heads;
    uint kv_heads;
    uint width;
    uint rotary;
    uint query_stride;
    uint gate;         // where in a query its head's gate begins; 0: there is none
    uint query_normed; // whether there is a weight
    uint key_normed;
    float epsilon;
    float scale;
};

constant constexpr uint BLOCK = 64; // tokens
constant constexpr uint ATTEND_THREADS = 256;
constant constexpr uint MERGE_THREADS = 512;

// A head before it is used: normalized, and turned by its position.
struct Head {
    device const float* values;
    device const float* weight;
    device const float* cosine;
    device const float* sine;
    uint normed;
    uint rotary;
    float factor;

    float normal(uint i) const { return normed ? values[i] * factor * weight[i] : values[i]; }

    // Value i. Values i and i + rotary / 2 are turned together.
    float turned(uint i) const
    {
        if (i >= rotary)
            return normal(i);
        const uint half_way = rotary / 2;
        const float other = i < half_way ? -normal(i + half_way) : normal(i - half_way);
        return normal(i) * cosine[i] + other * sine[i];
    }
};

// One over the root mean square of x [width], computed by a SIMD group.
inline float norm_factor(device const float* x, uint width, float epsilon, uint lane)
{
    float sum = 0.0f;
    for (uint i = lane; i < width; i += LANES)
        sum = fma(x[i], x[i], sum);
    return 1.0f / sqrt(simd_sum(sum) / float(width) + epsilon);
}

// The share of a block, for up to H heads of a KV head.
// `partial`: [heads, blocks, width] sums of values by weights, then [heads, blocks, 2] a block's largest score and its
// sum of weights, which are exponentials of scores less that one. `weights` [BLOCK, H] are scores first.
template <uint H>
inline void attend(
    constant Attention& shape, uint position, device const float* query, device const float* key,
    device const float* value, device const float* query_norm, device const float* key_norm, device const float* cosine,
    device const float* sine, device float* keys, device float* values, device float* partial, threadgroup float* space,
    threadgroup float* weights, threadgroup float* own_weights, uint2 group, uint thread_index, uint lane, uint simd)
{
    const uint width = shape.width, shared = shape.heads / shape.kv_heads, chunks = (shared + H - 1) / H;
    const uint block = group.x, blocks = position / BLOCK + 1, start = block * BLOCK;
    const uint kv_head = group.y / chunks, first = group.y % chunks * H;
    const uint cached = min(position - start, BLOCK); // tokens of this block that are in the cache
    const bool last = block + 1 == blocks;
    const ulong cache = ulong(kv_head) * shape.capacity * width;
    device const float* own_key = key + kv_head * width;
    device const float* own_value = value + kv_head * width;

    // Queries, and their scores of the token's own key: a SIMD group for each head. Where heads are fewer than H, the
    // last one is computed more than once.
    const uint head = kv_head * shared + min(first + simd, shared - 1);
    float own_score = -INFINITY;
    if (simd < H) {
        const bool keeps = last && first == 0 && simd == 0;
        const ulong place = cache + ulong(position) * width;
        device const float* own_query = query + head * shape.query_stride;
        const float factor = shape.query_normed ? norm_factor(own_query, width, shape.epsilon, lane) : 1.0f;
        const float key_factor = shape.key_normed ? norm_factor(own_key, width, shape.epsilon, lane) : 1.0f;
        const Head q = {own_query, query_norm, cosine, sine, shape.query_normed, shape.rotary, factor};
        const Head k = {own_key, key_norm, cosine, sine, shape.key_normed, shape.rotary, key_factor};
        float sum = 0.0f;
        for (uint i = lane; i < width; i += LANES) {
            const float asks = q.turned(i) * shape.scale, answers = k.turned(i);
            space[simd * width + i] = asks;
            sum = fma(asks, answers, sum);
            if (keeps) {
                keys[place + i] = answers;
                values[place + i] = own_value[i];
            }
        }
        sum = simd_sum(sum);
        own_score = last ? sum : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Scores: eight lanes share a token, and read 32 of its values at once; a SIMD group has eight tokens.
    const uint part = lane % 8, token = simd * 8 + lane / 8, other = token + 4;
    device const float* block_keys = keys + cache + ulong(start) * width;
    float sums[H], other_sums[H];
    for (uint h = 0; h < H; h++)
        sums[h] = other_sums[h] = 0.0f;
    for (uint i = 4 * part; i < width; i += 32) {
        const Quad a = token < cached ? *(device const Quad*)(block_keys + token * width + i) : Quad(0.0f);
        const Quad b = other < cached ? *(device const Quad*)(block_keys + other * width + i) : Quad(0.0f);
        for (uint h = 0; h < H; h++) {
            const Quad asks = *(threadgroup const Quad*)(space + h * width + i);
            sums[h] = add_products(asks, a, sums[h]);
            other_sums[h] = add_products(asks, b, other_sums[h]);
        }
    }
    for (uint h = 0; h < H; h++)
        for (ushort step = 1; step < 8; step *= 2) {
            sums[h] += simd_shuffle_xor(sums[h], step);
            other_sums[h] += simd_shuffle_xor(other_sums[h], step);
        }
    for (uint h = 0; part == 0 && h < H; h++) {
        weights[token * H + h] = token < cached ? sums[h] : -INFINITY;
        weights[other * H + h] = other < cached ? other_sums[h] : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (simd < H) {
        const float score = weights[lane * H + simd], later = weights[(lane + LANES) * H + simd];
        const float most = max(simd_max(max(score, later)), own_score);
        const float weight = exp(score - most), later_weight = exp(later - most), own_weight = exp(own_score - most);
        const float total = simd_sum(weight + later_weight) + own_weight;
        weights[lane * H + simd] = weight;
        weights[(lane + LANES) * H + simd] = later_weight;
        if (lane == 0) {
            own_weights[simd] = own_weight;
            if (first + simd < shared) {
                device float* numbers = partial + ulong(shape.heads) * blocks * width + (head * blocks + block) * 2;
                numbers[0] = most;
                numbers[1] = total;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Values: neighbours in a SIMD group read neighbours. Where heads are narrow, `parts` take every n-th token.
    const uint columns = min(width, ATTEND_THREADS), parts = ATTEND_THREADS / columns, mine = thread_index / columns;
    device const float* block_values = values + cache + ulong(start) * width;
    for (uint c = thread_index % columns; mine < parts && c < width; c += columns) {
        for (uint h = 0; h < H; h++)
            sums[h] = 0.0f;
#pragma unroll(4) // reads that do not wait for each other
        for (uint t = mine; t < cached; t += parts) {
            const float now = block_values[t * width + c];
            for (uint h = 0; h < H; h++)
                sums[h] = fma(weights[t * H + h], now, sums[h]);
        }
        for (uint h = 0; h < H; h++) {
            if (last && mine == 0)
                sums[h] = fma(own_weights[h], own_value[c], sums[h]);
            space[(mine * H + h) * width + c] = sums[h];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint some = min(H, shared - first);
    for (uint i = thread_index; i < some * width; i += ATTEND_THREADS) {
        const ulong row = ulong(kv_head * shared + first + i / width) * blocks + block;
        partial[row * width + i % width] = total_of_parts(space, parts, H * width, i);
    }
}

// Threadgroups: [blocks, KV heads times chunks of H heads]. `space` is room for the queries of H heads, of eight only
// if they are at most half of MOST_WIDTH wide: the host sees to it.
#define ATTEND(H)                                                                                               \
    kernel void attend_##H(                                                                                     \
        constant Attention& shape [[buffer(0)]], device const uint* position [[buffer(1)]],                     \
        device const float* query [[buffer(2)]], device const float* key [[buffer(3)]],                         \
        device const float* value [[buffer(4)]], device const float* query_norm [[buffer(5)]],                  \
        device const float* key_norm [[buffer(6)]], device const float* cosine [[buffer(7)]],                   \
        device const float* sine [[buffer(8)]], device float* keys [[buffer(9)]],                               \
        device float* values [[buffer(10)]], device float* partial [[buffer(11)]],                              \
        uint2 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],        \
        uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]])                  \
    {                                                                                                           \
        threadgroup Quad space[(H == 8 ? 4 : H) * MOST_WIDTH / 4];                                              \
        threadgroup float weights[BLOCK * H];                                                                   \
        threadgroup float own_weights[H];                                                                       \
        attend<H>(                                                                                              \
            shape, *position, query, key, value, query_norm, key_norm, cosine, sine, keys, values, partial,     \
            (threadgroup float*)space, weights, own_weights, group, thread_index, lane, simd);                  \
    }

ATTEND(1)
ATTEND(2)
ATTEND(4)
ATTEND(8)

#undef ATTEND

// out [heads, width]: the shares of all blocks, added up, times the logistic function of the gate. A threadgroup for
// each head; parts of it take every n-th block.
kernel void attend_merge(
    constant Attention& shape [[buffer(0)]], device const uint* position [[buffer(1)]],
    device const float* partial [[buffer(2)]], device const float* query [[buffer(3)]], device float* out [[buffer(4)]],
    uint head [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simd [[simdgroup_index_in_threadgroup]])
{
    threadgroup float sums[MERGE_THREADS];
    threadgroup float totals[MERGE_THREADS];
    threadgroup float most_of_simds[MERGE_THREADS / LANES];
    const uint width = shape.width, blocks = *position / BLOCK + 1;
    device const float* rows = partial + ulong(head) * blocks * width;
    device const float* numbers = partial + ulong(shape.heads) * blocks * width + head * blocks * 2;
    float most = -INFINITY;
    for (uint b = thread_index; b < blocks; b += MERGE_THREADS)
        most = max(most, numbers[2 * b]);
    most = simd_max(most);
    if (lane == 0)
        most_of_simds[simd] = most;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    most = simd_max(most_of_simds[lane % (MERGE_THREADS / LANES)]);

    const uint parts = MERGE_THREADS / width, part = thread_index / width, column = thread_index % width;
    if (part < parts) {
        float sum = 0.0f, total = 0.0f;
#pragma unroll(4)
        for (uint b = part; b < blocks; b += parts) {
            const float weight = exp(numbers[2 * b] - most);
            sum = fma(weight, rows[ulong(b) * width + column], sum);
            total = fma(weight, numbers[2 * b + 1], total);
        }
        sums[thread_index] = sum;
        totals[thread_index] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (part == 0) {
        float result = total_of_parts(sums, parts, width, column) / total_of_parts(totals, parts, width, column);
        if (shape.gate)
            result *= logistic(query[head * shape.query_stride + shape.gate + column]);
        out[head * width + column] = result;
    }
}

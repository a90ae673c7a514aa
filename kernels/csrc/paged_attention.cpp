// One unit is one row and one KV head with all the query heads that read it, up to four at a time
// ("lots"). Chunks of 128 keys, scores with 16 tokens as lanes, values with 16 of head_dim as lanes.
#include "exp.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

constexpr int kChunk = PagedAttention::kChunkTokens;
constexpr int kMaxDim = PagedAttention::kMaxHeadDim;

template <class T>
struct Head {
    const T* kv;  // this layer and KV head, page 0
    const int32_t* page_table;
    int64_t page_stride, page_size, dim;

    const T* page(int64_t token) const {
        return kv + page_table[token / page_size] * page_stride;
    }
    const T* keys(int64_t token) const { return page(token) + token % page_size * dim; }
    const T* values(int64_t token) const { return keys(token) + page_size * dim; }
};

template <int Lot>
struct Partial {
    float largest[Lot], total[Lot];
    alignas(64) float weighted[Lot][kMaxDim];
};

// Scores of `Blocks` sub-blocks of 16 tokens; lanes of tokens that do not exist hold anything.
template <int Lot, int Blocks, class T>
QUIRE_INLINE void score(const Head<T>& head, const float (*q)[kMaxDim], int64_t token,
                        float (*scores)[kChunk]) {
    const T* keys[Blocks];
    F16 sum[Lot][Blocks];
    for (int b = 0; b < Blocks; ++b) {
        keys[b] = head.keys(token + 16 * b);
        for (int i = 0; i < Lot; ++i) sum[i][b] = broadcast(0.0f);
    }
    for (int64_t d = 0; d < head.dim; ++d) {
        F16 k[Blocks];
        for (int b = 0; b < Blocks; ++b) k[b] = load(keys[b] + 16 * d);
        for (int i = 0; i < Lot; ++i)
            for (int b = 0; b < Blocks; ++b) sum[i][b] = fma(broadcast(q[i][d]), k[b], sum[i][b]);
    }
    for (int i = 0; i < Lot; ++i)
        for (int b = 0; b < Blocks; ++b) store(scores[i] + 16 * b, sum[i][b]);
}

// Turns scores into exp(score - largest) in place.
static void weigh(float* scores, int blocks, float* largest, float* total) {
    F16 top = load(scores);
    for (int b = 1; b < blocks; ++b) top = larger(top, load(scores + 16 * b));
    *largest = reduce_larger(top);
    F16 sum = broadcast(0.0f);
    for (int b = 0; b < blocks; ++b) {
        const F16 weight = exp_negative(load(scores + 16 * b) - broadcast(*largest));
        store(scores + 16 * b, weight);
        sum = sum + weight;
    }
    *total = reduce_sum(sum);
}

template <int Lot, int Vectors, class T>
QUIRE_INLINE void add_values(const Head<T>& head, const float (*weights)[kChunk], int64_t token,
                             int64_t tokens, int64_t d, float (*weighted)[kMaxDim]) {
    F16 sum[Lot][Vectors];
    for (int i = 0; i < Lot; ++i)
        for (int c = 0; c < Vectors; ++c) sum[i][c] = broadcast(0.0f);
    for (int64_t block = 0; block < tokens; block += 16) {
        const T* values = head.values(token + block) + d;  // of 16 tokens, all in one page
        const int64_t end = tokens - block < 16 ? tokens - block : 16;
        for (int64_t t = 0; t < end; ++t) {
            F16 v[Vectors];
            for (int c = 0; c < Vectors; ++c) v[c] = load(values + t * head.dim + 16 * c);
            for (int i = 0; i < Lot; ++i)
                for (int c = 0; c < Vectors; ++c)
                    sum[i][c] = fma(broadcast(weights[i][block + t]), v[c], sum[i][c]);
        }
    }
    for (int i = 0; i < Lot; ++i)
        for (int c = 0; c < Vectors; ++c) store(weighted[i] + d + 16 * c, sum[i][c]);
}

template <int Lot, class T>
static void attend_chunk(const Head<T>& head, const float (*q)[kMaxDim], int64_t token,
                         int64_t tokens, Partial<Lot>& out) {
    alignas(64) float scores[Lot][kChunk];
    const int blocks = int(ceil_div(tokens, 16));
    auto from = [&](int b) { return reinterpret_cast<float(*)[kChunk]>(&scores[0][16 * b]); };
    int b = 0;
    for (; b + kScoreBlocks <= blocks; b += kScoreBlocks)
        score<Lot, kScoreBlocks>(head, q, token + 16 * b, from(b));
    for (; b < blocks; ++b) score<Lot, 1>(head, q, token + 16 * b, from(b));

    for (int i = 0; i < Lot; ++i) {
        for (int64_t t = tokens; t < 16 * blocks; ++t) scores[i][t] = -__builtin_inff();
        weigh(scores[i], blocks, &out.largest[i], &out.total[i]);
    }
    int64_t d = 0;
    for (; d + 16 * kValueBlocks <= head.dim; d += 16 * kValueBlocks)
        add_values<Lot, kValueBlocks>(head, scores, token, tokens, d, out.weighted);
    for (; d < head.dim; d += 16) add_values<Lot, 1>(head, scores, token, tokens, d, out.weighted);
}

template <int Lot>
static void merge(Partial<Lot>& all, const Partial<Lot>& chunk, int64_t dim) {
    for (int i = 0; i < Lot; ++i) {
        const F16 left = broadcast(all.largest[i]), right = broadcast(chunk.largest[i]);
        const F16 top = larger(left, right);
        const F16 a = exp_negative(left - top), b = exp_negative(right - top);
        store_first(&all.largest[i], top, 1);
        store_first(&all.total[i],
                    fma(broadcast(all.total[i]), a, broadcast(chunk.total[i]) * b), 1);
        for (int64_t d = 0; d < dim; d += 16)
            store(all.weighted[i] + d,
                  fma(load(all.weighted[i] + d), a, load(chunk.weighted[i] + d) * b));
    }
}

template <int Lot, class T>
static void attend(const Head<T>& head, const float* q, float scale, int64_t tokens, float* out) {
    alignas(64) float scaled[Lot][kMaxDim];
    for (int i = 0; i < Lot; ++i)
        for (int64_t d = 0; d < head.dim; ++d) scaled[i][d] = q[i * head.dim + d] * scale;

    Partial<Lot> all, chunk;
    attend_chunk<Lot>(head, scaled, 0, tokens < kChunk ? tokens : kChunk, all);
    for (int64_t token = kChunk; token < tokens; token += kChunk) {
        const int64_t rest = tokens - token;
        attend_chunk<Lot>(head, scaled, token, rest < kChunk ? rest : kChunk, chunk);
        merge<Lot>(all, chunk, head.dim);
    }
    for (int i = 0; i < Lot; ++i)
        for (int64_t d = 0; d < head.dim; d += 16)
            store(out + i * head.dim + d, load(all.weighted[i] + d) / broadcast(all.total[i]));
}

template <class T>
static void paged_attention(const PagedAttention& a, int64_t unit) {
    const Pages& pages = a.pages;
    const int64_t row = unit / pages.kv_heads, kv_head = unit % pages.kv_heads;
    const int64_t group = a.query_heads / pages.kv_heads, tokens = a.positions[row] + 1;
    const int64_t start = (row * a.query_heads + kv_head * group) * pages.head_dim;
    const T* kv = static_cast<const T*>(pages.kv) + kv_head * 2 * pages.page_size * pages.head_dim;
    const Head<T> head{kv, a.row_pages[row], pages.page_stride, pages.page_size, pages.head_dim};
    for (int64_t i = 0; i < group; i += 4) {
        const float* q = a.q + start + i * pages.head_dim;
        float* out = a.out + start + i * pages.head_dim;
        switch (group - i) {
            case 1: attend<1>(head, q, a.scale, tokens, out); break;
            case 2: attend<2>(head, q, a.scale, tokens, out); break;
            case 3: attend<3>(head, q, a.scale, tokens, out); break;
            default: attend<4>(head, q, a.scale, tokens, out);
        }
    }
}

void paged_attention_f32(const PagedAttention& a, int64_t unit) { paged_attention<float>(a, unit); }
void paged_attention_bf16(const PagedAttention& a, int64_t unit) { paged_attention<bf16>(a, unit); }

}  // namespace quire::QUIRE_ISA

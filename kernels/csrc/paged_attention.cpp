// One unit is a block of consecutive rows of one sequence and a KV head. Its lines (a row and a
// query head each) go over the keys chunk by chunk and share every load: six at a time ("lots") in
// registers; where there are more, over keys and values widened to fp32 once for all.
//
// A line's sums are in one order whatever its lot, block and split: what it does not see is either
// not read or stands as a weight of zero where adding it changes no bit. While keys and values are
// read, those some sub-blocks further on are fetched, of the next chunk or unit too: pages are too
// short and too scattered for the processor to see them coming.
#include "exp.h"
#include "kernels.h"

namespace quire::QUIRE_ISA {

constexpr int kChunk = PagedAttention::kChunkTokens;
constexpr int kMaxDim = PagedAttention::kMaxHeadDim;
constexpr int kMaxLines = PagedAttention::kMaxLines;
constexpr int64_t kPartialSize = PagedAttention::partial_size(kMaxDim);
constexpr int kLot = 6;
constexpr int kVectors = kRegisters >= 32 ? 4 : 1;  // kLot times as many sums stay in registers
constexpr int kGroup = 4;  // sub-blocks of 16 tokens that stay in the first cache, widened
constexpr int kAhead = 8;  // sub-blocks, of keys or of values, from the one that is read to the one fetched

template <class T>
constexpr bool kScaled = sizeof(T) == 1;  // int8 has a scale per token

// The pages of one sequence, layer and KV head. K or V of a sub-block are 16 * head_dim elements in
// a row, both in one page.
template <class T>
struct Head {
    const Pages& pages;
    const uint8_t* base;  // of page 0
    const int32_t* page_table;

    const uint8_t* record(int64_t token) const {
        return base + page_table[token / pages.page_size] * pages.page_bytes;
    }
    const T* keys(int64_t token) const {
        return reinterpret_cast<const T*>(record(token)) +
               token % pages.page_size * pages.head_dim;
    }
    const T* values(int64_t token) const {
        return keys(token) + pages.page_size * pages.head_dim;
    }
    const float* key_scales(int64_t token) const {
        const int64_t elements = 2 * pages.page_size * pages.head_dim;
        return reinterpret_cast<const float*>(record(token) + elements * sizeof(T)) +
               token % pages.page_size;
    }
    const float* value_scales(int64_t token) const { return key_scales(token) + pages.page_size; }
};

template <class T>
static Head<T> head_of(const PagedAttention& a, const AttentionBlock& block, int64_t kv_head) {
    return {a.pages, a.pages.base + kv_head * a.pages.head_bytes, block.page_table};
}

// Sub-blocks of keys and values in the order in which units read them: a chunk's keys, then its
// values. After the last unit's last one comes that again.
template <class T>
class Stream {
public:
    Stream(const PagedAttention& a, int64_t unit) : a_(a) { open(unit); }

    const T* here() const {
        const AttentionBlock& block = a_.blocks[unit_ / a_.pages.kv_heads];
        const Head<T> head = head_of<T>(a_, block, unit_ % a_.pages.kv_heads);
        return values_ ? head.values(token_) : head.keys(token_);
    }
    void step() {
        token_ += 16;
        if (token_ < smaller_of(chunk_ + kChunk, end_)) return;
        if (values_) chunk_ = token_;
        values_ = !values_;
        token_ = chunk_;
        if (chunk_ >= end_) open(unit_ + 1);
    }

private:
    void open(int64_t unit) {
        unit_ = smaller_of(unit, a_.num_blocks * a_.pages.kv_heads - 1);
        const AttentionBlock& block = a_.blocks[unit_ / a_.pages.kv_heads];
        token_ = chunk_ = block.chunk * kChunk;
        end_ = smaller_of(chunk_ + block.chunks * kChunk, block.position + block.rows);
        values_ = false;
    }

    const PagedAttention& a_;
    int64_t unit_, chunk_, token_, end_;
    bool values_;
};

// Line i sees tokens first[i] .. end[i] - 1; neither falls from a line to the next.
struct Lines {
    alignas(64) float q[kMaxLines * kMaxDim];  // [lines, head_dim], scaled
    int64_t count, head_dim, first[kMaxLines], end[kMaxLines];
};

// A view of what a line has of a chunk, or of several merged.
struct Partial {
    float* at;
    float& largest() const { return at[0]; }    // score
    float& total() const { return at[1]; }      // of exp(score - largest), the weights
    float* weighted() const { return at + 2; }  // sum of weight * value, [head_dim]
};

// Lines line .. end - 1 see some of a chunk, line i its tokens from[i] .. to[i] - 1.
struct Chunk {
    int64_t token, line, end;
    int64_t from[kMaxLines], to[kMaxLines];
    alignas(64) float scores[kMaxLines][kChunk];  // then weights
    alignas(64) float key_scales[kChunk], value_scales[kChunk];
    Partial out[kMaxLines];

    int64_t first_block() const { return from[line] / 16; }
    int64_t end_block() const { return ceil_div(to[end - 1], 16); }
};

// Some sub-blocks' keys or values.
template <class T>
struct SubBlocks {
    int64_t count;
    const T* at[kGroup];
};

// Those of a page, and what to fetch while they are read.
template <class T>
struct PageBlocks : SubBlocks<T> {
    const T* next[kGroup];

    // To the second cache: a chunk's keys and values are as large as the first. Once per line.
    void fetch(int64_t block, int64_t element) const {
        if (element * int64_t(sizeof(T)) % 64 == 0)
            __builtin_prefetch(next[block] + element, 0, 2);
    }
};

// Those widened before, to which there is no next.
struct WideBlocks : SubBlocks<float> {
    void fetch(int64_t, int64_t) const {}
};

template <class Do>
QUIRE_INLINE void each_lot(int64_t line, int64_t end, const Do& act) {
    static_assert(kLot == 6);
    for (; end - line >= kLot; line += kLot) act.template operator()<kLot>(line);
    switch (end - line) {
        case 1: return act.template operator()<1>(line);
        case 2: return act.template operator()<2>(line);
        case 3: return act.template operator()<3>(line);
        case 4: return act.template operator()<4>(line);
        case 5: return act.template operator()<5>(line);
    }
}

// Scores of sub-blocks block .. block + Vectors - 1 for N lines.
template <int N, int Vectors, class Blocks>
QUIRE_INLINE void score(const Blocks& keys, int64_t block, const float* q, int64_t head_dim,
                        float (*scores)[kChunk]) {
    F16 sum[N][Vectors];
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < Vectors; ++c) sum[i][c] = broadcast(0.0f);
    for (int64_t d = 0; d < head_dim; ++d) {
        F16 k[Vectors];
        for (int c = 0; c < Vectors; ++c) {
            k[c] = load(keys.at[block + c] + 16 * d);
            keys.fetch(block + c, 16 * d);
        }
        for (int i = 0; i < N; ++i)
            for (int c = 0; c < Vectors; ++c)
                sum[i][c] = fma(broadcast(q[i * head_dim + d]), k[c], sum[i][c]);
    }
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < Vectors; ++c) store(&scores[i][16 * c], sum[i][c]);
}

template <class Blocks>
static void score_lots(const Blocks& keys, int64_t block, const Lines& lines, Chunk& chunk) {
    each_lot(chunk.line, chunk.end, [&]<int N>(int64_t line) {
        const float* q = lines.q + line * lines.head_dim;
        const auto scores = [&](int64_t b) {
            return reinterpret_cast<float(*)[kChunk]>(&chunk.scores[line][16 * (block + b)]);
        };
        int64_t b = 0;
        for (; b + kVectors <= keys.count; b += kVectors)
            score<N, kVectors>(keys, b, q, lines.head_dim, scores(b));
        for (; b < keys.count; ++b) score<N, 1>(keys, b, q, lines.head_dim, scores(b));
    });
}

// Adds tokens from .. end - 1 of the sub-blocks to `Vectors` vectors from `d` on.
template <int N, int Vectors, class Blocks>
QUIRE_INLINE void add_vectors(const Blocks& values, const float (*weights)[kChunk], int64_t from,
                              int64_t end, int64_t d, int64_t head_dim, const Partial* out) {
    F16 sum[N][Vectors];
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < Vectors; ++c) sum[i][c] = load(out[i].weighted() + d + 16 * c);
    while (from < end) {
        const int64_t block = from / 16, stop = smaller_of(end, 16 * (block + 1));
        for (; from < stop; ++from) {
            const int64_t element = from % 16 * head_dim + d;
            F16 v[Vectors];
            for (int c = 0; c < Vectors; ++c) {
                v[c] = load(values.at[block] + element + 16 * c);
                values.fetch(block, element + 16 * c);
            }
            for (int i = 0; i < N; ++i)
                for (int c = 0; c < Vectors; ++c)
                    sum[i][c] = fma(broadcast(weights[i][from]), v[c], sum[i][c]);
        }
    }
    for (int i = 0; i < N; ++i)
        for (int c = 0; c < Vectors; ++c) store(out[i].weighted() + d + 16 * c, sum[i][c]);
}

template <int N, class Blocks>
static void add_values(const Blocks& values, const float (*weights)[kChunk], int64_t from,
                       int64_t end, int64_t head_dim, const Partial* out) {
    int64_t d = 0;
    for (; d + 16 * kVectors <= head_dim; d += 16 * kVectors)
        add_vectors<N, kVectors>(values, weights, from, end, d, head_dim, out);
    for (; d < head_dim; d += 16)
        add_vectors<N, 1>(values, weights, from, end, d, head_dim, out);
}

// What every line of a lot sees is added for all at once; before and after it, line by line.
template <class Blocks>
static void add_lots(const Blocks& values, int64_t block, int64_t head_dim, Chunk& chunk) {
    const int64_t start = 16 * block, stop = start + 16 * values.count;
    const auto add = [&]<int N>(int64_t line, int64_t from, int64_t to) {
        from = larger_of(from, start), to = smaller_of(to, stop);
        const auto weights =
            reinterpret_cast<const float(*)[kChunk]>(&chunk.scores[line][start]);
        if (from < to)
            add_values<N>(values, weights, from - start, to - start, head_dim, chunk.out + line);
    };
    each_lot(chunk.line, chunk.end, [&]<int N>(int64_t line) {
        const int64_t* from = chunk.from + line;
        const int64_t* to = chunk.to + line;
        const int64_t all_from = from[N - 1], all_to = larger_of(all_from, to[0]);
        for (int i = 0; i < N; ++i)
            add.template operator()<1>(line + i, from[i], smaller_of(to[i], all_from));
        add.template operator()<N>(line, all_from, all_to);
        for (int i = 0; i < N; ++i)
            add.template operator()<1>(line + i, larger_of(from[i], all_to), to[i]);
    });
}

// Turns the scores of what a line sees into weights, and starts its weighted sum.
template <class T>
static void weigh(int64_t head_dim, Chunk& chunk, int64_t line) {
    float* scores = chunk.scores[line];
    const int64_t from = chunk.from[line], to = chunk.to[line];
    const int64_t start = from / 16 * 16, stop = round_up(to, 16);
    if constexpr (kScaled<T>)
        for (int64_t t = start; t < stop; t += 16)
            store(scores + t, load(scores + t) * load(chunk.key_scales + t));
    for (int64_t t = start; t < from; ++t) scores[t] = -__builtin_inff();
    for (int64_t t = to; t < stop; ++t) scores[t] = -__builtin_inff();

    F16 top = load(scores + start);
    for (int64_t t = start + 16; t < stop; t += 16) top = larger(top, load(scores + t));
    const Partial out = chunk.out[line];
    out.largest() = reduce_larger(top);
    const F16 largest = broadcast(out.largest());
    F16 sum = broadcast(0.0f);
    for (int64_t t = start; t < stop; t += 16) {
        F16 weight = exp_negative(load(scores + t) - largest);
        sum = sum + weight;
        if constexpr (kScaled<T>) weight = weight * load(chunk.value_scales + t);
        store(scores + t, weight);
    }
    out.total() = reduce_sum(sum);
    for (int64_t d = 0; d < head_dim; d += 16) store(out.weighted() + d, broadcast(0.0f));
}

template <class T>
static WideBlocks widened(const PageBlocks<T>& blocks, int64_t elements, float* to) {
    WideBlocks wide{{blocks.count, {}}};
    for (int64_t b = 0; b < blocks.count; ++b, to += elements) {
        wide.at[b] = to;
        for (int64_t i = 0; i < elements; i += 16) {
            store(to + i, load(blocks.at[b] + i));
            blocks.fetch(b, i);
        }
    }
    return wide;
}

// Calls act(blocks, index of the first) for all sub-blocks of a chunk, some at a time.
// find(index) says where a sub-block is; what `ahead` gives is fetched meanwhile.
template <class T, class Find, class Do>
QUIRE_INLINE void each_group(const Chunk& chunk, int64_t head_dim, Stream<T>& ahead,
                             const Find& find, const Do& act) {
    const bool widen = sizeof(T) < sizeof(float) && chunk.end - chunk.line > kLot;
    alignas(64) float wide[kGroup * 16 * kMaxDim];
    PageBlocks<T> blocks;
    const int64_t end = chunk.end_block();
    for (int64_t block = chunk.first_block(); block < end; block += blocks.count) {
        blocks.count = smaller_of(end - block, kGroup);
        for (int64_t b = 0; b < blocks.count; ++b, ahead.step()) {
            blocks.at[b] = find(block + b);
            blocks.next[b] = ahead.here();
        }
        if (widen)
            act(widened(blocks, 16 * head_dim, wide), block);
        else
            act(blocks, block);
    }
}

template <class T>
static void attend_chunk(const Head<T>& head, const Lines& lines, Stream<T>& ahead, Chunk& chunk) {
    const int64_t dim = head.pages.head_dim;
    const auto find_keys = [&](int64_t block) {
        const int64_t token = chunk.token + 16 * block;
        if constexpr (kScaled<T>) {
            store(chunk.key_scales + 16 * block, load(head.key_scales(token)));
            store(chunk.value_scales + 16 * block, load(head.value_scales(token)));
        }
        return head.keys(token);
    };
    const auto find_values = [&](int64_t block) { return head.values(chunk.token + 16 * block); };
    each_group<T>(chunk, dim, ahead, find_keys, [&](const auto& keys, int64_t block) {
        score_lots(keys, block, lines, chunk);
    });
    for (int64_t line = chunk.line; line < chunk.end; ++line) weigh<T>(dim, chunk, line);
    each_group<T>(chunk, dim, ahead, find_values, [&](const auto& values, int64_t block) {
        add_lots(values, block, dim, chunk);
    });
}

static void clear(Partial all, int64_t head_dim) {
    all.largest() = -__builtin_inff();
    all.total() = 0.0f;
    for (int64_t d = 0; d < head_dim; d += 16) store(all.weighted() + d, broadcast(0.0f));
}

// The one with the smaller maximum is rescaled to the larger.
static void merge(Partial all, Partial next, int64_t head_dim) {
    const bool grows = next.largest() > all.largest();
    const float difference = all.largest() - next.largest();
    const F16 one = broadcast(1.0f);
    const F16 less = exp_negative(broadcast(grows ? difference : -difference));
    const F16 a = grows ? less : one, b = grows ? one : less;
    if (grows) all.largest() = next.largest();
    store_first(&all.total(), fma(broadcast(all.total()), a, broadcast(next.total()) * b), 1);
    for (int64_t d = 0; d < head_dim; d += 16)
        store(all.weighted() + d, fma(load(all.weighted() + d), a, load(next.weighted() + d) * b));
}

static void finish(Partial all, int64_t head_dim, float* out) {
    const F16 total = broadcast(all.total());
    for (int64_t d = 0; d < head_dim; d += 16) store(out + d, load(all.weighted() + d) / total);
}

static int64_t group_of(const PagedAttention& a) { return a.query_heads / a.pages.kv_heads; }

// Where line `line` of a block stands in q and out.
static int64_t line_offset(const PagedAttention& a, const AttentionBlock& block, int64_t kv_head,
                           int64_t line) {
    const int64_t group = group_of(a), head = kv_head * group + line % group;
    return ((block.row + line / group) * a.query_heads + head) * a.pages.head_dim;
}

static void load_lines(const PagedAttention& a, const AttentionBlock& block, int64_t kv_head,
                       Lines& lines) {
    const int64_t dim = a.pages.head_dim, group = group_of(a);
    lines.count = block.rows * group;
    lines.head_dim = dim;
    for (int64_t line = 0; line < lines.count; ++line) {
        const float* q = a.q + line_offset(a, block, kv_head, line);
        for (int64_t d = 0; d < dim; d += 16)
            store(lines.q + line * dim + d, load(q + d) * broadcast(a.scale));
        lines.end[line] = block.position + line / group + 1;
        lines.first[line] = a.window ? larger_of(0, lines.end[line] - a.window) : 0;
    }
}

// Of row `index` of those whose partials are stored.
static Partial stored_partial(const PagedAttention& a, int64_t index, int64_t kv_head,
                              int64_t head) {
    const int64_t line = (index * a.pages.kv_heads + kv_head) * group_of(a) + head;
    return {a.partials + line * PagedAttention::partial_size(a.pages.head_dim)};
}

// The lines that see some of the chunk at `token`, and where what they get of it goes.
static void open_chunk(const Lines& lines, int64_t token, Chunk& chunk) {
    chunk.token = token;
    chunk.line = 0, chunk.end = lines.count;
    while (chunk.line < chunk.end && lines.end[chunk.line] <= token) ++chunk.line;
    while (chunk.line < chunk.end && lines.first[chunk.end - 1] >= token + kChunk) --chunk.end;
    for (int64_t line = chunk.line; line < chunk.end; ++line) {
        chunk.from[line] = larger_of(lines.first[line] - token, 0);
        chunk.to[line] = smaller_of(lines.end[line] - token, kChunk);
    }
}

template <class T>
static void attend(const PagedAttention& a, int64_t unit) {
    const AttentionBlock& block = a.blocks[unit / a.pages.kv_heads];
    const int64_t kv_head = unit % a.pages.kv_heads, dim = a.pages.head_dim, group = group_of(a);
    const Head<T> head = head_of<T>(a, block, kv_head);
    Stream<T> ahead(a, unit);
    for (int i = 0; i < kAhead; ++i) ahead.step();
    Lines lines;
    load_lines(a, block, kv_head, lines);

    const bool whole = block.partial < 0;
    float merged[kMaxLines][kPartialSize], partial[kMaxLines][kPartialSize];
    for (int64_t line = 0; whole && line < lines.count; ++line) clear({merged[line]}, dim);
    Chunk chunk;
    for (int64_t index = 0; index < block.chunks; ++index) {
        open_chunk(lines, (block.chunk + index) * kChunk, chunk);
        for (int64_t line = chunk.line; line < chunk.end; ++line) {
            const int64_t row = block.partial + index * block.rows + line / group;
            chunk.out[line] =
                whole ? Partial{partial[line]} : stored_partial(a, row, kv_head, line % group);
        }
        attend_chunk(head, lines, ahead, chunk);
        for (int64_t line = chunk.line; whole && line < chunk.end; ++line)
            merge({merged[line]}, chunk.out[line], dim);
    }
    for (int64_t line = 0; whole && line < lines.count; ++line)
        finish({merged[line]}, dim, a.out + line_offset(a, block, kv_head, line));
}

void paged_attention(const PagedAttention& a, int64_t unit) {
    switch (a.pages.format) {
        case KvFormat::f32: return attend<float>(a, unit);
        case KvFormat::bf16: return attend<bf16>(a, unit);
        case KvFormat::int8: return attend<int8_t>(a, unit);
    }
}

void merge_attention(const MergeAttention& m, int64_t unit) {
    const PagedAttention& a = m.attention;
    const MergeRow& row = m.rows[unit / a.pages.kv_heads];
    const int64_t kv_head = unit % a.pages.kv_heads, dim = a.pages.head_dim, group = group_of(a);
    for (int64_t head = 0; head < group; ++head) {
        float merged[kPartialSize];
        clear({merged}, dim);
        for (int64_t chunk = 0; chunk < row.chunks; ++chunk)
            merge({merged}, stored_partial(a, row.partial + chunk * row.stride, kv_head, head),
                  dim);
        const int64_t query_head = row.row * a.query_heads + kv_head * group + head;
        finish({merged}, dim, a.out + query_head * dim);
    }
}

}  // namespace quire::QUIRE_ISA

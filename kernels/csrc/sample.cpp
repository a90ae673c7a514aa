// Chooses the token of a row, bit for bit as `kernels/sample` defines it.
//
// Loops are written for the compiler to vectorise: over whole chunks of a padded row, no branches.
#include "sample.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quire::QUIRE_SAMPLE_ISA {

namespace {

constexpr float kImpossible = -__builtin_inff();  // the value of an id that may not be chosen
constexpr float kLargest = __FLT_MAX__;
constexpr int kLanes = 16;
constexpr int kChunk = SampleScratch::kPadding;

float larger(float a, float b) { return a > b ? a : b; }
float smaller(float a, float b) { return a < b ? a : b; }
float clip(float x) { return larger(smaller(x, kLargest), -kLargest); }

// The best of `count` numbers, at least one.
template <float (*better)(float, float)>
float best_of(const float* x, int64_t count) {
    float lanes[kLanes];
    for (float& lane : lanes) lane = x[0];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] = better(lanes[j], x[i + j]);
    for (; i < count; ++i) lanes[0] = better(lanes[0], x[i]);
    for (float lane : lanes) lanes[0] = better(lanes[0], lane);
    return lanes[0];
}

float largest_of(const float* x, int64_t count) { return best_of<larger>(x, count); }
float smallest_of(const float* x, int64_t count) { return best_of<smaller>(x, count); }

// Whether one of a chunk is at least `value` with `more` added.
bool chunk_reaches(const float* x, float value, float more = 0) {
    int reached = 0;
    for (int i = 0; i < kChunk; ++i) reached |= x[i] + more >= value;
    return reached;
}

int64_t first_at_least(const float* x, float value) {
    int64_t i = 0;
    while (!chunk_reaches(x + i, value)) i += kChunk;
    while (!(x[i] >= value)) ++i;
    return i;
}

// -- masks, penalties, temperature

// False if a logit is NaN or +Inf, or all are -Inf.
bool take_logits(const float* logits, int64_t vocab, float* values, int64_t padded) {
    int wrong = 0, possible = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        values[i] = logits[i];
        wrong |= !(logits[i] <= kLargest);
        possible |= logits[i] > kImpossible;
    }
    for (int64_t i = vocab; i < padded; ++i) values[i] = kImpossible;
    return possible && !wrong;
}

float repeated(float value, float repetition) {
    return value > 0 ? value / repetition : value * repetition;
}

void penalize(const SampleRow& row, float* values, int32_t* counts) {
    const auto set = [&](int32_t id, float value) {
        values[id] = row.logits[id] == kImpossible ? kImpossible : clip(value);
    };
    for (int64_t i = 0; i < row.num_biases; ++i) values[row.bias_ids[i]] += row.biases[i];
    for (int64_t i = 0; i < row.num_output; ++i) ++counts[row.output_ids[i]];
    for (int64_t i = 0; i < row.num_seen; ++i) {
        const int32_t id = row.seen_ids[i];
        if (counts[id] == 0) set(id, repeated(values[id], row.repetition));
    }
    for (int64_t i = 0; i < row.num_output; ++i) {
        const int32_t id = row.output_ids[i];
        if (counts[id] == 0) continue;  // had its turn
        const float frequency = row.frequency * float(counts[id]);
        set(id, repeated(values[id], row.repetition) - frequency - row.presence);
        counts[id] = 0;
    }
}

void forbid(const bool* forbidden, float* values, int64_t vocab) {
    for (int64_t i = 0; i < vocab; ++i) values[i] = forbidden[i] ? kImpossible : values[i];
}

void divide(float* values, int64_t padded, float temperature) {
    for (int64_t i = 0; i < padded; ++i) {
        const float quotient = clip(values[i] / temperature);
        values[i] = values[i] == kImpossible ? kImpossible : quotient;
    }
}

// -- filters

void keep_at_least(float border, float* values, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i)
        values[i] = values[i] >= border ? values[i] : kImpossible;
}

int64_t gather_at_least(float border, const float* values, int64_t padded, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < padded; ++i) {
        out[count] = values[i];
        count += values[i] >= border;
    }
    return count;
}

// floor(2^32 * exp(x)) of x = values - highest, integers held as fp64.
void find_masses(const float* values, int64_t count, float highest, double* masses) {
    constexpr float kPolynomial[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                     1.6666665459e-1f, 5.0000001201e-1f};
    constexpr double kRound = 0x1p52;  // adding it leaves the nearest integer
    for (int64_t i = 0; i < count; ++i) {
        float x = values[i] - highest;
        const bool has_mass = x >= -23.0f;
        x = has_mass ? x : 0.0f;
        const float t = x * 1.44269504088896341f + 0.5f;
        int32_t n = int32_t(t);
        n -= float(n) > t;
        x -= float(n) * 0.693359375f;
        x -= float(n) * -2.12194440e-4f;
        float y = 1.9875691500e-4f;
        for (float factor : kPolynomial) y = y * x + factor;
        y = y * (x * x);
        y = y + x;
        y = y + 1.0f;
        const double scaled = double(y) * __builtin_bit_cast(double, int64_t(n + 1055) << 52);
        const double nearest = (scaled + kRound) - kRound;
        const double mass = nearest - (nearest > scaled ? 1.0 : 0.0);
        masses[i] = has_mass ? mass : 0.0;
    }
}

// Integers below 2^53: exact in any order.
double sum_of(const double* x, int64_t count) {
    double lanes[kLanes] = {}, sum = 0;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
    for (; i < count; ++i) sum += x[i];
    for (double lane : lanes) sum += lane;
    return sum;
}

// The highest value such that it and all higher ones together weigh at least `enough`, which is a
// positive integer they do weigh. Weights are integers. Looks for the one bucket of a histogram
// that holds the value, then at its entries only. Leaves `values` and `weights` in another order.
float border_of(float* values, double* weights, int32_t* buckets, int64_t count, double enough) {
    constexpr int kBuckets = 1024;
    for (;;) {
        const float low = smallest_of(values, count), high = largest_of(values, count);
        if (low == high) return low;
        const double scale = (kBuckets - 1) / (double(high) - double(low));
        for (int64_t i = 0; i < count; ++i)
            buckets[i] = int32_t((double(high) - double(values[i])) * scale);
        double histogram[kBuckets] = {};
        for (int64_t i = 0; i < count; ++i) histogram[buckets[i]] += weights[i];
        int bucket = 0;
        while (histogram[bucket] < enough) enough -= histogram[bucket++];
        int64_t left = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (buckets[i] != bucket) continue;
            values[left] = values[i];
            weights[left++] = weights[i];
        }
        count = left;
    }
}

// Makes the values impossible that min_p, top_k and top_p leave out.
void filter(const SampleRow& row, float highest, const SampleScratch& scratch, int64_t padded) {
    float border = larger(highest + row.log_min_p, -kLargest);
    if (row.top_k > 0) {
        const int64_t count = gather_at_least(border, scratch.values, padded, scratch.kept);
        for (int64_t i = 0; i < count; ++i) scratch.masses[i] = 1;
        if (row.top_k < count)
            border = border_of(scratch.kept, scratch.masses, scratch.buckets, count,
                               double(row.top_k));
    }
    if (row.top_p < 1) {
        // What is left out here has no mass.
        const int64_t count = gather_at_least(larger(border, highest - 24.0f), scratch.values,
                                              padded, scratch.kept);
        find_masses(scratch.kept, count, highest, scratch.masses);
        const double enough = __builtin_ceil(row.top_p * sum_of(scratch.masses, count));
        border = border_of(scratch.kept, scratch.masses, scratch.buckets, count, enough);
    }
    keep_at_least(border, scratch.values, padded);
}

// -- noise

// Philox4x32-10 of several blocks at once: a lane of 64 bits holds a word of 32 in its low half;
// what is in the other half does not matter.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectorLanes = kVectorBytes / 8;
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

Words product(Words a, uint32_t b) {
#if defined(__AVX512F__)
    return Words(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
    return Words(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#elif defined(__x86_64__)
    return Words(_mm_mul_epu32(__m128i(a), _mm_set1_epi64x(b)));
#else
    return (a & 0xFFFFFFFF) * b;
#endif
}

// The random words of the ids of one chunk, `first_id` being the chunk's first.
void find_words(const SampleRow& row, int64_t first_id, uint32_t* words) {
    for (int i = 0; i < kChunk / 4; i += kVectorLanes) {
        Words c0, c1 = Words{} + row.position, c2 = Words{} + row.choice_index, c3 = Words{};
        for (int j = 0; j < kVectorLanes; ++j) c0[j] = uint64_t(first_id / 4 + i + j);
        uint32_t k0 = uint32_t(row.seed), k1 = uint32_t(row.seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const Words p0 = product(c0, 0xD2511F53), p1 = product(c2, 0xCD9E8D57);
            c0 = (p1 >> 32) ^ c1 ^ k0;
            c2 = (p0 >> 32) ^ c3 ^ k1;
            c1 = p1;
            c3 = p0;
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        const Words low = (c0 & 0xFFFFFFFF) | c1 << 32, high = (c2 & 0xFFFFFFFF) | c3 << 32;
        for (int j = 0; j < kVectorLanes; ++j) {
            const uint64_t block[2] = {low[j], high[j]};
            __builtin_memcpy(words + 4 * (i + j), block, sizeof block);
        }
    }
}

float log1(float f, float e) {
    constexpr float kPolynomial[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                     1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                     -2.4999993993e-1f, 3.3333331174e-1f};
    const float z = f * f;
    float y = 7.0376836292e-2f;
    for (float factor : kPolynomial) y = y * f + factor;
    y = y * f;
    y = y * z;
    y = y + e * -2.12194440e-4f;
    y = y + z * -0.5f;
    return (f + y) + e * 0.693359375f;
}

struct Parts {
    float f, e;
};

Parts split(float v) {
    const int32_t bits = __builtin_bit_cast(int32_t, v), e = (bits - 0x3F3504F3) >> 23;
    return {__builtin_bit_cast(float, bits - (e << 23)) - 1.0f, float(e)};
}

float gumbel(uint32_t word) {
    Parts u = {float(int64_t(~word) * 2 + 1) * -0x1p-33f, 0};
    if (word < 3037000500u) {
        u = split(float(int64_t(word) * 2 + 1));
        u.e -= 33;
    }
    const Parts q = split(-log1(u.f, u.e));
    return -log1(q.f, q.e);
}

// What no noise exceeds: 22.88 is the most there is.
constexpr float kMostNoise = 23.0f;

// What the noise of `word` does not exceed. With d = 2^32 - 1 - word: -log(u) > 1 - u > d / 2^32,
// and log2(y) >= (bits of y) / 2^23 - 127, a chord per octave; 0.01 is more than all roundings.
float noise_bound(uint32_t word) {
    const float half_d = float(int32_t(~word >> 1));
    const float bits = float(__builtin_bit_cast(int32_t, half_d));
    return 0.69314718f * (158.0f - bits * 0x1p-23f) + 0.01f;
}

struct Best {
    float score;
    int64_t id;

    void offer(float other_score, int64_t other_id) {
        if (other_score > score || (other_score == score && other_id < id))
            *this = {other_score, other_id};
    }
};

void offer_chunk(const float* values, const uint32_t* words, int64_t first_id, Best& best) {
    float bounds[kChunk];
    for (int i = 0; i < kChunk; ++i) bounds[i] = values[i] + noise_bound(words[i]);
    if (!chunk_reaches(bounds, best.score)) return;
    for (int i = 0; i < kChunk; ++i)
        if (bounds[i] >= best.score) best.offer(values[i] + gumbel(words[i]), first_id + i);
}

// The id of the largest value + noise. Noise is made where it may matter only: rounding a sum is
// monotone, so what stays below the best with more noise than it has would with its own.
int64_t draw(const SampleRow& row, const float* values, int64_t padded, float highest) {
    uint32_t words[kChunk];
    const int64_t likely = first_at_least(values, highest);
    find_words(row, likely / kChunk * kChunk, words);
    Best best{highest + gumbel(words[likely % kChunk]), likely};
    for (int64_t i = 0; i < padded; i += kChunk) {
        if (!chunk_reaches(values + i, best.score, kMostNoise)) continue;
        find_words(row, i, words);
        offer_chunk(values + i, words, i, best);
    }
    return best.id;
}

// -- logprobs

double exp_negative(double x) {
    constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer
    constexpr double kFactors[] = {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                                   1.0 / 24,     1.0 / 6,     0.5,        1.0,       1.0};
    const bool has_mass = x >= -700.0;
    x = has_mass ? x : 0.0;
    const double t = x * 1.4426950408889634 + kRound;
    const double n = t - kRound;
    const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    double sum = 1.0 / 3628800;
    for (double factor : kFactors) sum = sum * r + factor;
    const uint64_t power = (__builtin_bit_cast(uint64_t, t) + 1023) << 52;
    return has_mass ? sum * __builtin_bit_cast(double, power) : 0.0;
}

double sum_of_exponentials(const float* logits, int64_t vocab, double highest) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[j] += exp_negative(logits[i + j] - highest);
    for (int j = 0; i + j < vocab; ++j) lanes[j] += exp_negative(logits[i + j] - highest);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

double log_of(double x) {
    constexpr int64_t kRootHalf = 0x3FE6A09E667F3BCD;
    const int64_t bits = __builtin_bit_cast(int64_t, x), e = (bits - kRootHalf) >> 52;
    const double m = __builtin_bit_cast(double, bits - (e << 52));
    const double f = (m - 1.0) / (m + 1.0), s = f * f;
    double sum = 1.0 / 23;
    for (int k = 21; k >= 1; k -= 2) sum = sum * s + 1.0 / k;
    return 2.0 * f * sum + double(e) * 0x1.62e42fefa39efp-1;
}

// The list of the best, highest logprob first, lower ids first among equals; offered by ascending
// id. Logprobs grow with logits, so what is not above the logit of the last one is no better.
class TopList {
public:
    explicit TopList(const SampleRow& row) : row_(row) {
        for (int64_t i = 0; i < row.num_top; ++i) {
            row.top_ids[i] = -1;
            row.top_logprobs[i] = kImpossible;
        }
    }

    float floor() const { return floor_; }

    void offer(int32_t id, float logprob) {
        int64_t at = row_.num_top;
        for (; at > 0 && logprob > row_.top_logprobs[at - 1]; --at)
            if (at < row_.num_top) move_down(at - 1);
        if (at == row_.num_top) return;
        row_.top_ids[at] = id;
        row_.top_logprobs[at] = logprob;
        const int32_t last = row_.top_ids[row_.num_top - 1];
        if (last >= 0) floor_ = row_.logits[last];
    }

private:
    void move_down(int64_t at) {
        row_.top_ids[at + 1] = row_.top_ids[at];
        row_.top_logprobs[at + 1] = row_.top_logprobs[at];
    }

    const SampleRow& row_;
    float floor_ = kImpossible;
};

void tell_logprobs(const SampleRow& row, int64_t vocab) {
    const double highest = largest_of(row.logits, vocab);
    const double log_total = log_of(sum_of_exponentials(row.logits, vocab, highest));
    const auto logprob = [&](int64_t id) { return float(row.logits[id] - highest - log_total); };
    *row.logprob = logprob(*row.token_id);
    if (row.num_top == 0) return;
    TopList list(row);
    for (int64_t i = 0; i < vocab; ++i)
        if (row.logits[i] > list.floor()) list.offer(int32_t(i), logprob(i));
}

int64_t choose(const SampleRow& row, int64_t vocab) {
    const int64_t padded = SampleScratch::padded(vocab);
    const SampleScratch scratch = sample_scratch(padded);
    float* values = scratch.values;
    if (!take_logits(row.logits, vocab, values, padded)) return kNotNumbers;
    penalize(row, values, scratch.counts);
    if (row.forbidden) forbid(row.forbidden, values, vocab);
    float highest = largest_of(values, padded);
    if (highest == kImpossible) return kNothingLeft;
    if (row.temperature == 0) return first_at_least(values, highest);
    if (row.temperature != 1) divide(values, padded, row.temperature);
    highest = clip(highest / row.temperature);
    if (row.log_min_p > kImpossible || row.top_k > 0 || row.top_p < 1)
        filter(row, highest, scratch, padded);
    return draw(row, values, padded, highest);
}

}  // namespace

void sample(const Sample& batch, int64_t index) {
    const SampleRow& row = batch.rows[index];
    *row.token_id = int32_t(choose(row, batch.vocab));
    if (row.num_top >= 0 && *row.token_id >= 0) tell_logprobs(row, batch.vocab);
}

}  // namespace quire::QUIRE_SAMPLE_ISA

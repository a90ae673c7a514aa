#include "fetch_ahead.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "isa.h"
#include "thread_pool.h"

namespace quire {

namespace {

// The last one is for a single row: more gained nothing by it where that was tried.
constexpr std::array<Ahead, 5> kCandidates{
    Ahead{}, {1024, false}, {4096, false}, {8192, false}, {2048, true}};
constexpr int kTries = 5;
constexpr int64_t kMostRows = 8, kMostBytesPerInput = 4;
// Less is read from caches, whatever is fetched; more takes longer and tells no more.
constexpr int64_t kLeastBytes = int64_t(64) << 20, kMostBytes = int64_t(96) << 20;
// What must be gained for what the hardware does not do by itself.
constexpr double kLeastGain = 0.98;

// Another model may run while the first large one is loaded.
std::array<std::atomic<Ahead>, kUsualFetchAhead.size()> chosen{
    kUsualFetchAhead[0], kUsualFetchAhead[1], kUsualFetchAhead[2], kUsualFetchAhead[3]};

int64_t bytes_of(const Matrix& w) { return w.tiles * w.tile_bytes; }

// Products of a few rows of zeros with all of these matrices.
class Products {
public:
    explicit Products(const std::vector<Matrix>& weights) : weights_(weights) {
        int64_t outputs = 0, inputs = 0, groups = 0;
        for (const Matrix& w : weights) {
            outputs = larger_of(outputs, w.outputs);
            inputs = larger_of(inputs, w.inputs);
            groups = larger_of(groups, w.inputs / w.group);
        }
        out_ = std::vector<float>(size_t(kMostRows * outputs));
        values_ = std::vector<uint8_t>(
            size_t(kMostRows * inputs * kMostBytesPerInput + kReadBeyondInputs));
        scales_ = std::vector<float>(size_t(kMostRows * groups));
        sums_ = std::vector<int32_t>(size_t(kMostRows * groups));
    }

    double seconds(int64_t rows, Ahead ahead) {
        std::vector<Linear> products;
        std::vector<Phase> phases;
        products.reserve(weights_.size());
        for (const Matrix& w : weights_) {
            const InputRows x{w.reads, w.rotated, 1, rows, w.inputs, w.group, values_.data(),
                              scales_.data(), sums_.data(), ahead};
            products.push_back({w, x, nullptr, out_.data(), false, rows, w.outputs, rows, 1});
            phases.push_back({call, &products.back(), w.tiles});
        }
        const auto began = std::chrono::steady_clock::now();
        ThreadPool::instance().run(phases.data(), int64_t(phases.size()));
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    }

private:
    static void call(const void* args, int64_t unit) {
        current_isa().kernels->linear(*static_cast<const Linear*>(args), unit);
    }

    const std::vector<Matrix>& weights_;
    std::vector<float> out_, scales_;
    std::vector<uint8_t> values_;
    std::vector<int32_t> sums_;
};

}  // namespace

FetchAhead fetch_ahead() {
    FetchAhead ahead;
    std::copy(chosen.begin(), chosen.end(), ahead.begin());
    return ahead;
}

void set_fetch_ahead(const FetchAhead& ahead) {
    std::copy(ahead.begin(), ahead.end(), chosen.begin());
}

Ahead fetch_ahead_of(int64_t rows) {
    return chosen[rows >= 8 ? 3 : rows >= 4 ? 2 : rows >= 2 ? 1 : 0];
}

void measure_fetch_ahead(const std::vector<Matrix>& weights) {
    static std::atomic<bool> measured{false};
    std::vector<Matrix> taken;
    int64_t bytes = 0;
    for (const Matrix& w : weights) {
        if (bytes >= kMostBytes) break;
        taken.push_back(w);
        bytes += bytes_of(w);
    }
    if (bytes < kLeastBytes || measured.exchange(true)) return;
    Products products(taken);
    for (size_t place = 0; place < chosen.size(); ++place) {
        // To what none takes beside it: how fast a shared machine is changes from moment to moment.
        std::array<std::array<double, kTries>, kCandidates.size()> ratios;
        const size_t candidates = kCandidates.size() - (place > 0);
        for (int i = 0; i < kTries; ++i) {
            const int64_t rows = int64_t(1) << place;
            const double none = products.seconds(rows, kCandidates[0]);
            for (size_t c = 1; c < candidates; ++c)
                ratios[c][i] = products.seconds(rows, kCandidates[c]) / none;
        }
        Ahead best = kCandidates[0];
        double least = kLeastGain;
        for (size_t c = 1; c < candidates; ++c) {
            std::sort(ratios[c].begin(), ratios[c].end());
            if (ratios[c][kTries / 2] >= least) continue;
            least = ratios[c][kTries / 2];
            best = kCandidates[c];
        }
        chosen[place] = best;
    }
}

}  // namespace quire

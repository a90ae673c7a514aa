#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "peaks.h"

namespace nb = nanobind;

namespace quire {
namespace {

constexpr int kMaxThreads = 256;

void check(int threads, double seconds) {
    if (threads < 1 || threads > kMaxThreads)
        throw std::invalid_argument("threads must be in 1..256");
    if (!(seconds >= 0 && seconds <= 60))
        throw std::invalid_argument("seconds must be in 0..60");
}

std::optional<std::pair<double, std::string>> peak_ops(const std::string& arithmetic, int threads,
                                                       double seconds) {
    check(threads, seconds);
    const Loop* loop = best_loop(arithmetic.c_str());
    if (!loop) return std::nullopt;
    nb::gil_scoped_release released;
    return std::pair(ops_per_second(*loop, threads, seconds), std::string(loop->instruction));
}

double peak_read(int64_t num_bytes, int threads, double seconds) {
    check(threads, seconds);
    if (num_bytes < int64_t(threads) << 12)
        throw std::invalid_argument("num_bytes must be at least 4096 for each thread");
    nb::gil_scoped_release released;
    return bytes_per_second(num_bytes, threads, seconds);
}

}  // namespace

void bind_peaks(nb::module_& m) {
    using namespace nb::literals;
    m.def("peak_ops", peak_ops, "arithmetic"_a, "threads"_a, "seconds"_a);
    m.def("peak_read", peak_read, "num_bytes"_a, "threads"_a, "seconds"_a);
}

}  // namespace quire

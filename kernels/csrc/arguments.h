// Checks of what comes from Python: every shape, dtype and index, by the argument's name.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "isa.h"
#include "refusal.h"
#include "thread_pool.h"

namespace quire {

namespace nb = nanobind;
using Array = nb::ndarray<>;

template <class T>
constexpr nb::dlpack::dtype kType = nb::dtype<T>();
template <>
constexpr nb::dlpack::dtype kType<bf16>{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

template <class T>
bool holds(const Array& a) {
    return a.dtype() == kType<T>;
}

inline std::string text(std::initializer_list<int64_t> shape) {
    std::string out = "[";
    for (int64_t size : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
    return out + "]";
}

// The address of a CPU array that is C-contiguous and of exactly this shape.
inline void* address(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (a.device_type() != nb::device::cpu::value) refuse(name, "be in CPU memory");
    bool equal = a.ndim() == shape.size();
    for (size_t i = 0; equal && i < shape.size(); ++i) equal = a.shape(i) == *(shape.begin() + i);
    if (!equal) refuse(name, "have shape " + text(shape));
    int64_t stride = 1;  // of arrays without elements, strides are anything
    for (size_t i = a.ndim(); i-- > 0 && a.size() > 0; stride *= a.shape(i))
        if (a.shape(i) > 1 && a.stride(i) != stride) refuse(name, "be contiguous");
    return a.data();
}

template <class T>
T* data(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (!holds<T>(a)) refuse(name, "have another dtype (see the op's contract)");
    return static_cast<T*>(address(a, name, shape));
}

inline int64_t size(const Array& a, const char* name, size_t dimensions, size_t dimension) {
    if (a.ndim() != dimensions) refuse(name, "have " + std::to_string(dimensions) + " dimensions");
    return a.shape(dimension);
}

template <class Args>
void run(Unit<Args> unit, const Args& args, int64_t units) {
    nb::gil_scoped_release released;
    ThreadPool::instance().run(unit, args, units);
}

// `kv`, all layers' pages of a pool, as the pages of one layer. In bind_attention.cpp.
Pages pages_of(const Array& kv, int64_t layer, const std::string& dtype, int64_t page_size,
               int64_t head_dim);

}  // namespace quire

// A pair of bf16 inputs and its product, where the instruction set has none of its own: the odd
// elements first, as vdpbf16ps does; included inside the instruction sets' namespaces.

QUIRE_INLINE float widen_bits(uint32_t bits) {
    float r;
    __builtin_memcpy(&r, &bits, sizeof r);
    return r;
}
QUIRE_INLINE Pairs broadcast_pair(const bf16* p) {
    return {broadcast(widen_bits(uint32_t(p[0].bits) << 16)),
            broadcast(widen_bits(uint32_t(p[1].bits) << 16))};
}
QUIRE_INLINE F16 dot(const F16& sum, const Pairs& w, const Pairs& x) {
    return fma(w.even, x.even, fma(w.odd, x.odd, sum));
}

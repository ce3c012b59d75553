// gelu.h: GELU, by its approximation with tanh. kernels.h includes this once for each kind of processor, as
// NNG_TARGET.
//
// torch computes a tanh, which takes longer than all else that stands between two products of a block. But
// 1 + tanh(u) = 2 / (1 + exp(-2u)), so that an exponential will do.

namespace nng::kernels::NNG_TARGET {

// exp(v) within two units in the last place, for v from -87 to 88.7; infinite above, 1e-38 below. The polynomial
// is that of Cephes's expf.
NNG_INLINE void exponential(Floats& v) {
  constexpr float kLeast = -87.0f, kMost = 88.8f;
  constexpr float kRound = 12582912.0f;  // added, it leaves an integer in the low bits
  v = v < kLeast ? Floats{} + kLeast : v;
  v = v > kMost ? Floats{} + kMost : v;
  Floats rounded = v * 1.44269504f + kRound, n = rounded - kRound;
  Floats r = v - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Words power = (reinterpret_cast<Words>(rounded) << 23) + 0x3f800000u;
  v = (p * r * r + r + 1.0f) * reinterpret_cast<Floats>(power);
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
NNG_INLINE void tanh_gelu(Floats& v) {
  constexpr float kTwice = 2 * 0.7978845608028654f;
  Floats e = -kTwice * (v + 0.044715f * v * v * v);
  exponential(e);
  v = v * (1.0f / (1.0f + e));
}

template <typename T>
void tanh_gelu(const T* x, T* y, int64_t n) {
  constexpr int64_t kLeast = 1 << 13;  // numbers that are worth a thread
  const int64_t threads = threads_for(n, kLeast);
  in_parallel(threads, [&](int64_t thread) {
    Range some = part(thread, threads, n, 64);
    Floats v;
    int64_t i = some.from;
    for (; i + kLanes <= some.to; i += kLanes) {
      get(v, x + i);
      tanh_gelu(v);
      put(y + i, v);
    }
    if (i < some.to) {
      T rest[kLanes] = {};
      std::copy(x + i, x + some.to, rest);
      get(v, rest);
      tanh_gelu(v);
      put(rest, v);
      std::copy(rest, rest + (some.to - i), y + i);
    }
  });
}

}  // namespace nng::kernels::NNG_TARGET

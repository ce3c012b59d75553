// lanes.h: numbers that are computed at once. kernels.h includes this once for each kind of processor, as
// NNG_TARGET; NNG_LANES is how many numbers are.

namespace nng::kernels::NNG_TARGET {

typedef float Floats __attribute__((vector_size(4 * NNG_LANES)));
typedef std::uint32_t Words __attribute__((vector_size(4 * NNG_LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * NNG_LANES)));

constexpr int kLanes = NNG_LANES;

NNG_INLINE void get(Floats& v, const float* from) { std::memcpy(&v, from, sizeof v); }

NNG_INLINE void get(Floats& v, const at::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  v = reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

NNG_INLINE void put(float* to, const Floats& v) { std::memcpy(to, &v, sizeof v); }

// Rounded to the nearest, to even between two.
NNG_INLINE void put(at::BFloat16* to, const Floats& v) {
  Words bits = reinterpret_cast<Words>(v);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words nan = reinterpret_cast<Words>(v != v);
  Halves halves = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// Sums of neighbours, those of a and of b in turn: one by one, ...
NNG_INLINE void in_turn(Floats& v, const Floats& a, const Floats& b) {
#if NNG_LANES == 16
  v = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
      __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#else
  v = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
      __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#endif
}

// ... and two by two.
NNG_INLINE void two_in_turn(Floats& v, const Floats& a, const Floats& b) {
#if NNG_LANES == 16
  v = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
      __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#else
  v = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
      __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#endif
}

// The sums of the numbers in each of R registers.
template <int R>
NNG_INLINE void totals(const Floats (&v)[R], float (&sums)[R]) {
  float lanes[kLanes];
  Floats all = v[0];
  if constexpr (R > 1) in_turn(all, v[0], v[1]);
  if constexpr (R == 4) {
    Floats rest;
    in_turn(rest, v[2], v[3]);
    two_in_turn(all, all, rest);
  }
  std::memcpy(lanes, &all, sizeof lanes);
  for (int n = kLanes / 2; n >= R; n /= 2) {
    NNG_UNROLL for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  }
  std::memcpy(sums, lanes, sizeof sums);
}

}  // namespace nng::kernels::NNG_TARGET

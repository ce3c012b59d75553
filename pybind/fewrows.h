// fewrows.h: the product of a few rows with a weight as it lies in memory. kernels.h includes this once for each
// kind of processor, as NNG_TARGET; with NNG_PAIRS, it has instructions that multiply pairs of bfloat16.
//
// Such a product takes as long as reading the weight does, if the weight is read as fast as memory allows and
// all rows are multiplied on the way. torch hands it to a BLAS, which reads at a half of that speed or less.
// Here all of torch's threads read, each a stretch of its own in the order of memory, and each number once.

namespace nng::kernels::NNG_TARGET {

constexpr int kWeights = NNG_LANES / 4;  // weight rows at once, so that the sums stay in registers
constexpr int kBlock = 8;                // rows at once by columns ...
constexpr int kDots = 5;                 // ... and otherwise

// ---- arithmetic: what a kernel multiplies, and in what order its sums lie ----

// Numbers one by one, in single precision.
template <typename T>
struct Single {
  using Element = T;      // of the weight
  using Factor = float;   // of x, by columns
  using Operand = float;  // of x, otherwise
  using Register = Floats;
  static constexpr int kStep = 1;       // inputs that a multiplication takes, by columns
  static constexpr int kRegisters = 1;  // of weights then
  static constexpr int kDeep = 8;       // inputs that are taken before sums are put down: 8 ways has a near cache
  static constexpr int kWide = kLanes;  // numbers in a register of weights

  static NNG_INLINE Factor factor(const T* x, bool) { return as_float(*x); }
  static NNG_INLINE void columns(Register (&v)[1], const T* w, int64_t, bool) { get(v[0], w); }
  static NNG_INLINE void multiply(Floats& sum, const Register& a, const Register& b) { sum += a * b; }
  static NNG_INLINE void multiply(Floats& sum, const Register& a, Factor b) { sum += a * b; }
  static NNG_INLINE void in_order(Floats (&)[1]) {}
  template <typename U>
  static NNG_INLINE void row(Register& v, const U* from) {
    get(v, from);
  }
};

#ifdef NNG_PAIRS
// Pairs of bfloat16, by an instruction that adds their products to a sum in single precision.
struct Pairs {
  using Element = at::BFloat16;
  using Factor = std::uint32_t;
  using Operand = at::BFloat16;
  using Register = __m512i;
  static constexpr int kStep = 2;
  static constexpr int kRegisters = 2;
  static constexpr int kDeep = 16;
  static constexpr int kWide = 32;

  static NNG_INLINE Factor factor(const Element* x, bool odd) {
    return x[0].x | (odd ? 0 : static_cast<std::uint32_t>(x[1].x) << 16);
  }
  // Two rows of 32 columns, a column's two numbers side by side; of an odd last row, with zeros.
  static NNG_INLINE void columns(Register (&v)[2], const Element* w, int64_t out, bool odd) {
    __m512i a = _mm512_loadu_si512(w), b = odd ? _mm512_setzero_si512() : _mm512_loadu_si512(w + out);
    v[0] = _mm512_unpacklo_epi16(a, b);
    v[1] = _mm512_unpackhi_epi16(a, b);
  }
  static NNG_INLINE void multiply(Floats& sum, const Register& a, const Register& b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static NNG_INLINE void multiply(Floats& sum, const Register& a, Factor b) {
    multiply(sum, a, _mm512_set1_epi32(static_cast<int>(b)));
  }
  // Unpacking takes eight columns of each part of a register, four to each side.
  static NNG_INLINE void in_order(Floats (&v)[2]) {
    Floats a = v[0], b = v[1];
    v[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    v[1] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  static NNG_INLINE void row(Register& v, const Element* from) { v = _mm512_loadu_si512(from); }
};
#endif

// ---- a weight [in, out]: multiples of its rows are added up ----

// Sums of all rows for a stretch of columns lie in tiles: [columns / kTile, blocks of rows, M, kTile].
template <typename A>
constexpr int kTile = A::kRegisters * kLanes;

// How so many rows are taken in blocks of up to `most`.
struct Blocks {
  int64_t count;
  int64_t rows;  // of each; the last one may have fewer

  Blocks(int64_t all, int64_t most) : count(divided(all, most)), rows(divided(all, count)) {}
};

// K rows of the weight at w, for one tile and one block of M rows. The next ones are fetched if ahead.
template <typename A, int M, int K>
NNG_INLINE void add(const typename A::Element* w, int64_t out, const typename A::Factor* x, float* sums, bool first,
                    bool ahead) {
  constexpr bool kOdd = K < A::kStep;
  Floats acc[M][A::kRegisters];
  NNG_UNROLL for (int m = 0; m < M; m++) {
    NNG_UNROLL for (int r = 0; r < A::kRegisters; r++) {
      if (first) {
        acc[m][r] = Floats{};
      } else {
        get(acc[m][r], sums + (m * A::kRegisters + r) * kLanes);
      }
    }
  }
  NNG_UNROLL for (int k = 0; k < K; k += A::kStep) {
    typename A::Register v[A::kRegisters];
    A::columns(v, w + k * out, out, kOdd);
    if (ahead) {
      NNG_UNROLL for (int s = 0; s < A::kStep; s++) __builtin_prefetch(w + (k + s + A::kDeep) * out, 0, 2);
    }
    NNG_UNROLL for (int m = 0; m < M; m++) {
      const auto f = x[k / A::kStep * M + m];
      NNG_UNROLL for (int r = 0; r < A::kRegisters; r++) A::multiply(acc[m][r], v[r], f);
    }
  }
  NNG_UNROLL for (int m = 0; m < M; m++) {
    NNG_UNROLL for (int r = 0; r < A::kRegisters; r++) put(sums + (m * A::kRegisters + r) * kLanes, acc[m][r]);
  }
}

// K rows of the weight from k on, for all rows of x and some tiles.
template <typename A, int M, int K>
void deepen(const Product<typename A::Element>& p, int64_t k, Range tiles, float* sums, bool first) {
  const Blocks blocks(p.rows, kBlock);
  constexpr int kFactors = (K + A::kStep - 1) / A::kStep;
  typename A::Factor x[kMost / kBlock][kFactors * M] = {};
  for (int64_t row = 0; row < p.rows; row++) {
    for (int j = 0; j < kFactors; j++) {
      x[row / M][j * M + row % M] = A::factor(p.x + row * p.in + k + j * A::kStep, K < A::kStep);
    }
  }
  for (int64_t t = tiles.from; t < tiles.to; t++) {
    // The last tile begins early enough to be whole: its columns are those of the one before it, in part.
    const auto* w = p.w + k * p.out + std::min(t * kTile<A>, p.out - kTile<A>);
    for (int64_t b = 0; b < blocks.count; b++, sums += M * kTile<A>) {
      add<A, M, K>(w, p.out, x[b], sums, first, b == 0);
    }
  }
}

// The sums over some inputs, for some tiles.
template <typename A, int M>
void columns(const Product<typename A::Element>& p, Range in, Range tiles, float* sums) {
  constexpr int64_t kNear = 1 << 15;  // sums that stay in a near cache
  const int64_t tile = Blocks(p.rows, kBlock).count * M * kTile<A>, near = std::max<int64_t>(kNear / tile, 1);
  for (Range some{tiles.from, 0}; some.from < tiles.to; some.from = some.to) {
    some.to = std::min(some.from + near, tiles.to);
    int64_t k = in.from;
    for (; k + A::kDeep <= in.to; k += A::kDeep) deepen<A, M, A::kDeep>(p, k, some, sums, k == in.from);
    for (; k + A::kStep <= in.to; k += A::kStep) deepen<A, M, A::kStep>(p, k, some, sums, k == in.from);
    if (k < in.to) deepen<A, M, 1>(p, k, some, sums, k == in.from);
    sums += (some.to - some.from) * tile;
  }
}

// Adds up what the threads have summed, and the bias.
template <typename A>
void finish(const Product<typename A::Element>& p, Range tiles, const float* sums, int64_t parts, int64_t apart) {
  const Blocks blocks(p.rows, kBlock);
  for (int64_t t = tiles.from; t < tiles.to; t++) {
    const int64_t at = std::min(t * kTile<A>, p.out - kTile<A>);
    for (int64_t row = 0; row < p.rows; row++) {
      const float* of_row = sums + (t * blocks.count * blocks.rows + row) * kTile<A>;
      Floats acc[A::kRegisters] = {};
      for (int64_t i = 0; i < parts; i++) {
        NNG_UNROLL for (int r = 0; r < A::kRegisters; r++) {
          Floats v;
          get(v, of_row + i * apart + r * kLanes);
          acc[r] += v;
        }
      }
      A::in_order(acc);
      NNG_UNROLL for (int r = 0; r < A::kRegisters; r++) {
        if (p.bias != nullptr) {
          Floats bias;
          get(bias, p.bias + at + r * kLanes);
          acc[r] += bias;
        }
        put(p.y + row * p.out + at + r * kLanes, acc[r]);
      }
    }
  }
}

template <typename A>
void by_columns(const Product<typename A::Element>& p, int64_t threads) {
  constexpr void (*kKernels[])(const Product<typename A::Element>&, Range, Range, float*) = {
      columns<A, 1>, columns<A, 2>, columns<A, 3>, columns<A, 4>,
      columns<A, 5>, columns<A, 6>, columns<A, 7>, columns<A, 8>};
  static_assert(std::size(kKernels) == kBlock);
  const Blocks blocks(p.rows, kBlock);
  const int64_t tiles = divided(p.out, kTile<A>), tile = blocks.count * blocks.rows * kTile<A>;
  // A thread reads memory in order if it has all columns of some inputs. But then each one has sums of all,
  // and what is done for those shall stay an eighth of what is done for the weight.
  int64_t deep = std::clamp<int64_t>(p.in / (16 * p.rows), 1, threads);
  while (threads % deep != 0) deep--;
  const int64_t wide = threads / deep, apart = tiles * tile;
  at::Tensor all = at::empty({deep * apart}, at::kFloat);
  auto* sums = all.mutable_data_ptr<float>();
  const int64_t parts = divided(p.in, part(0, deep, p.in, A::kDeep).to);  // fewer than deep where those are rounded up
  in_parallel(parts * wide, [&](int64_t i) {
    Range some = part(i % wide, wide, tiles, 1);
    if (some.from == some.to) return;
    kKernels[blocks.rows - 1](p, part(i / wide, deep, p.in, A::kDeep), some,
                              sums + i / wide * apart + some.from * tile);
  });
  const int64_t ends = parts * p.rows * p.out > 1 << 15 ? threads : 1;
  in_parallel(ends, [&](int64_t i) { finish<A>(p, part(i, ends, tiles, 1), sums, parts, apart); });
}

// ---- a weight [out, in]: an output is the product of two rows ----

// Outputs [o, o + R) of M rows from `row` on, which x has as [in / kWide, M, kWide].
template <typename A, int M, int R>
NNG_INLINE void dot(const Product<typename A::Element>& p, const typename A::Operand* x, int64_t row, int64_t o) {
  const auto* w = p.w + o * p.in;
  const bool ahead = R > 1 && row == 0;  // the first block of rows has the weight's next rows fetched
  Floats acc[M][R] = {};
  const int64_t whole = p.in / A::kWide;
  for (int64_t i = 0; i < whole; i++) {
    typename A::Register v[R];
    NNG_UNROLL for (int r = 0; r < R; r++) {
      A::row(v[r], w + r * p.in + i * A::kWide);
      if (ahead) __builtin_prefetch(w + (r + R) * p.in + i * A::kWide, 0, 2);
    }
    NNG_UNROLL for (int m = 0; m < M; m++) {
      typename A::Register f;
      A::row(f, x + (i * M + m) * A::kWide);
      NNG_UNROLL for (int r = 0; r < R; r++) A::multiply(acc[m][r], v[r], f);
    }
  }
  NNG_UNROLL for (int m = 0; m < M; m++) {
    if (row + m == p.rows) break;
    float sums[R];
    totals(acc[m], sums);
    for (int r = 0; r < R; r++) {
      for (int64_t i = whole * A::kWide; i < p.in; i++) {
        sums[r] += as_float(p.x[(row + m) * p.in + i]) * as_float(w[r * p.in + i]);
      }
      if (p.bias != nullptr) sums[r] += as_float(p.bias[o + r]);
      p.y[(row + m) * p.out + o + r] = sums[r];
    }
  }
}

template <typename A, int M>
void dots(const Product<typename A::Element>& p, const typename A::Operand* x, Range outputs) {
  constexpr int R = kWeights;
  const int64_t blocks = Blocks(p.rows, kDots).count, each = p.in / A::kWide * A::kWide * M;
  int64_t o = outputs.from;
  for (; o + R <= outputs.to; o += R) {
    for (int64_t b = 0; b < blocks; b++) dot<A, M, R>(p, x + b * each, b * M, o);
  }
  for (; o < outputs.to; o++) {
    for (int64_t b = 0; b < blocks; b++) dot<A, M, 1>(p, x + b * each, b * M, o);
  }
}

template <typename A>
void by_rows(const Product<typename A::Element>& p, int64_t threads) {
  using Operand = typename A::Operand;
  constexpr void (*kKernels[])(const Product<typename A::Element>&, const Operand*, Range) = {
      dots<A, 1>, dots<A, 2>, dots<A, 3>, dots<A, 4>, dots<A, 5>};
  static_assert(std::size(kKernels) == kDots);
  const Blocks blocks(p.rows, kDots);
  const int64_t whole = p.in / A::kWide, each = whole * A::kWide * blocks.rows;
  at::Tensor all = at::empty({blocks.count * each}, c10::CppTypeToScalarType<Operand>::value);
  auto* x = all.template mutable_data_ptr<Operand>();
  for (int64_t row = 0; row < blocks.count * blocks.rows; row++) {
    Operand* to = x + row / blocks.rows * each + row % blocks.rows * A::kWide;
    const auto* from = p.x + std::min(row, p.rows - 1) * p.in;  // what lacks is not stored
    for (int64_t i = 0; i < whole; i++, to += blocks.rows * A::kWide, from += A::kWide) {
      for (int k = 0; k < A::kWide; k++) to[k] = from[k];
    }
  }
  in_parallel(threads, [&](int64_t i) {
    Range some = part(i, threads, p.out, kWeights);
    if (some.from < some.to) kKernels[blocks.rows - 1](p, x, some);
  });
}

template <typename A>
void multiply(const Product<typename A::Element>& p, bool columns) {
  constexpr int64_t kLeast = 1 << 15;  // numbers of a weight that are worth a thread
  const int64_t threads = threads_for(p.in * p.out, kLeast);
  if (columns) return by_columns<A>(p, threads);
  by_rows<A>(p, threads);
}

}  // namespace nng::kernels::NNG_TARGET

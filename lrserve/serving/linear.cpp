// y = x W^T + b in bfloat16 with AVX-512, accumulated in float32. serving/linear.py builds it, for the machine that it is on: with dot
// products of pairs (VDPBF16PS) where there are such, else x and W become float32 on their way into ordinary multiplications.
//
// W (m, n) is packed for it: 48 rows are one block (the last one has 16, 32 or 48, filled up with zeros), and in a block the values
// of two neighbouring inputs stand together: [block][n / 2][rows of the block][2]. So a vector register holds 16 rows of one pair of
// inputs, a thread reads its weights from the first byte to the last, and one layout serves one token and a thousand.
//
// A tile is up to 8 tokens by 48 rows, whose 24 sums stay in registers. Threads divide vectors of 16 rows, and where there are too few
// of those also the tokens.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/DimVector.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using Value = c10::BFloat16;

constexpr int kLanes = 16;        // rows of W in a register
constexpr int kVectors = 3;       // registers of a block
constexpr int kTokens = 8;        // of a tile
constexpr size_t kReach = 8;      // parts that a thread looks at, its own and those that it may help with

#ifdef __AVX512BF16__

using Input = Value;              // what x is multiplied as
constexpr int64_t kPanel = 512;   // tokens that pass through all of a thread's weights at a time: their x is to stay in a cache
constexpr int64_t kDepth = 4096;  // inputs that do so, if there is more than one tile: so is a block of W
constexpr int64_t kAhead = 4096;  // bytes of weights that one tile of tokens asks for in advance

// x (tokens, n) as it is multiplied, in `room` where it is not so yet.
const Input* as_inputs(const Value* x, int64_t, int64_t, std::vector<Input>&) { return x; }

// How far behind its first value a tile of tokens has its input k.
constexpr int64_t offset(int64_t k, int) { return k; }

// Adds the products of R tokens, whose first inputs are n apart, and V registers of rows over one pair of inputs.
template <int R, int V>
inline void add(const Value* w, const Input* x, int64_t n, __m512 (&into)[R][V]) {
  __m512bh rows[V];
  for (int v = 0; v < V; ++v) rows[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 2 * kLanes * v));
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    int32_t both;
    std::memcpy(&both, x + i * n, sizeof both);
    const auto token = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
    for (int v = 0; v < V; ++v) into[i][v] = _mm512_dpbf16_ps(into[i][v], rows[v], token);
  }
}

// Weights that pass but once are to leave the caches to what a step needs again. From two tokens on, asking costs more: AMD's
// processors do it better by themselves.
constexpr bool kShared = false;  // whether the tiles of several tokens ask for the next weights together
template <int R>
inline void ask(const char* next, const char*) {
  if constexpr (R == 1) _mm_prefetch(next, _MM_HINT_NTA);
}

inline __m256i rounded(__m512 sum) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)); }

#else

using Input = float;
constexpr int64_t kPanel = 128;
constexpr int64_t kDepth = 1024;
constexpr int64_t kAhead = 6144;

constexpr int64_t offset(int64_t k, int tokens) { return k * tokens; }

// A bfloat16 is the upper half of a float32; in 32 bits the first of a pair is the lower half.
inline __m512 first(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF))); }

// Columns of 8 rows of 8 values of 32 bits, `apart` bfloat16 apart.
inline std::array<__m256i, 8> columns(const Value* x, int64_t apart) {
  __m256i two[8], four[8];
  for (int i = 0; i < 8; i += 2) {
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * apart));
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (i + 1) * apart));
    two[i] = _mm256_unpacklo_epi32(upper, lower), two[i + 1] = _mm256_unpackhi_epi32(upper, lower);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm256_unpacklo_epi64(two[i + j], two[i + j + 2]);
      four[i + 2 * j + 1] = _mm256_unpackhi_epi64(two[i + j], two[i + j + 2]);
    }
  std::array<__m256i, 8> result;
  for (int i = 0; i < 4; ++i) {
    result[i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
    result[i + 4] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
  }
  return result;
}

// A tile's values stand input by input, as it reads them.
const Input* as_inputs(const Value* x, int64_t tokens, int64_t n, std::vector<Input>& room) {
  room.resize(std::max<size_t>(room.size(), tokens * n));
  for (int64_t token = 0; token < tokens; token += kTokens) {
    const int64_t some = std::min<int64_t>(kTokens, tokens - token);
    const Value* from = x + token * n;
    Input* to = room.data() + token * n;
    int64_t k = 0;
    if (some == kTokens)
      for (; k + 16 <= n; k += 16)
        for (const __m256i& pairs : columns(from + k, n)) {
          _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
          _mm256_storeu_ps(to + 8, _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF))));
          to += 16;
        }
    if (some == 1) {
      std::copy(from, from + n, to);
    } else {
      for (; k < n; ++k)
        for (int64_t i = 0; i < some; ++i) *to++ = from[i * n + k];
    }
  }
  return room.data();
}

template <int R, int V>
inline void add(const Value* w, const Input* x, int64_t, __m512 (&into)[R][V]) {
  __m512i pairs[V];
  for (int v = 0; v < V; ++v) pairs[v] = _mm512_loadu_si512(w + 2 * kLanes * v);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512 rows[V];
    for (int v = 0; v < V; ++v) rows[v] = half ? second(pairs[v]) : first(pairs[v]);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512 token = _mm512_set1_ps(x[half * R + i]);
      for (int v = 0; v < V; ++v) into[i][v] = _mm512_fmadd_ps(rows[v], token, into[i][v]);
    }
  }
}

// Intel's processors read up to half as much again if they are asked, for the second cache and then for the first: probably since a
// tile has too much to do with its weights to have many of its loads under way. Asked to pass by the second cache (NTA), they read
// half as much.
constexpr bool kShared = true;
constexpr int64_t kNear = 3072;  // bytes from where a tile reads to what it asks for for the first cache
template <int R>
inline void ask(const char* next, const char* here) {
  _mm_prefetch(next, _MM_HINT_T1);
  _mm_prefetch(here + kNear, _MM_HINT_T0);
}

// To the nearest bfloat16, of two equally near the even one; what is not a number stays so.
inline __m256i rounded(__m512 sum) {
  const __m512i bits = _mm512_castps_si512(sum), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000)), 16));
}

#endif

// Adds (or, if `begins`, writes) the products of R tokens and V registers of rows over `pairs` pairs of inputs to sums [R][16 V],
// and asks for 64 V bytes of weights for each pair, `step` bytes apart from `next` on.
template <int R, int V>
void tile(const Value* w, int64_t stride, const Input* x, int64_t n, int64_t pairs, float* sums, bool begins, const char* next,
          int64_t step) {
  constexpr int kChains = R * V >= 6 ? 1 : R * V >= 3 ? 2 : 4;  // additions wait for each other: keep several under way
  __m512 sum[kChains][R][V];
  for (int u = 0; u < kChains; ++u)
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v)
        sum[u][i][v] = u || begins ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (i * V + v) * kLanes);
  const auto add_pair = [&](int64_t pair, auto& into) {
    const Value* here = w + pair * stride;
    for (int v = 0; v < V; ++v) ask<R>(next + pair * step + 64 * v, reinterpret_cast<const char*>(here) + 64 * v);
    add<R, V>(here, x + offset(2 * pair, R), n, into);
  };
  int64_t pair = 0;
  for (; pair + kChains <= pairs; pair += kChains)
#pragma GCC unroll 4
    for (int u = 0; u < kChains; ++u) add_pair(pair + u, sum[u]);
  for (; pair < pairs; ++pair) add_pair(pair, sum[0]);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      for (int u = 1; u < kChains; ++u) sum[0][i][v] = _mm512_add_ps(sum[0][i][v], sum[u][i][v]);
      _mm512_storeu_ps(sums + (i * V + v) * kLanes, sum[0][i][v]);
    }
}

using Tile = void (*)(const Value*, int64_t, const Input*, int64_t, int64_t, float*, bool, const char*, int64_t);

template <int V>
constexpr std::array<Tile, kTokens> tiles() {
  return {tile<1, V>, tile<2, V>, tile<3, V>, tile<4, V>, tile<5, V>, tile<6, V>, tile<7, V>, tile<8, V>};
}

constexpr std::array<std::array<Tile, kTokens>, kVectors> kTiles = {tiles<1>(), tiles<2>(), tiles<3>()};

// Rounds the sums of `tokens` tokens and `vectors` registers, with the bias, into y (., m) from row `row` of W on.
void store(const float* sums, int tokens, int vectors, const Value* bias, Value* y, int64_t m, int64_t row) {
  for (int v = 0; v < vectors; ++v, row += kLanes) {
    const __mmask16 mask = m - row >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << (m - row)) - 1);
    __m512 b = _mm512_setzero_ps();
    if (bias) {
      const __m256i bits = _mm256_maskz_loadu_epi16(mask, bias + row);
      b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    for (int i = 0; i < tokens; ++i) {
      const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + (i * vectors + v) * kLanes), b);
      _mm256_mask_storeu_epi16(y + i * m + row, mask, rounded(sum));
    }
  }
}

// What one thread begins with: tokens [begin, end), registers of rows [from, to). Its pieces are a block of W for a panel of tokens
// each, panel by panel, so that it reads its weights in one go. Who has finished takes the last pieces of those who have not: cores
// of one machine are not equally fast.
struct alignas(64) Part {
  int64_t begin, end, from, to, blocks;
  std::atomic<uint64_t> left;  // pieces that nobody has taken: the first in the lower half, the end in the upper one

  void set(int64_t tokens_from, int64_t tokens_to, int64_t rows_from, int64_t rows_to) {
    begin = tokens_from, end = tokens_to, from = rows_from, to = rows_to;
    blocks = (to + kVectors - 1) / kVectors - from / kVectors;
    left.store(static_cast<uint64_t>((end - begin + kPanel - 1) / kPanel * blocks) << 32, std::memory_order_relaxed);
  }

  // The first piece that is left, or for who helps out the last; -1 if there is none.
  int64_t take(bool helps) {
    uint64_t now = left.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = now & UINT32_MAX, stop = now >> 32;
      if (first >= stop) return -1;
      const uint64_t rest = helps ? now - (uint64_t{1} << 32) : now + 1;
      if (left.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return static_cast<int64_t>(helps ? stop - 1 : first);
    }
  }
};

// What a thread works with.
struct Workspace {
  std::vector<float> sums;
  std::vector<Input> room;
  const Input* inputs = nullptr;
  int64_t begin = -1;  // first token of the panel whose values `inputs` are
};

struct Product {
  const Value *x, *w, *bias;
  Value* y;
  int64_t n, m, vectors;

  void piece(const Part& part, int64_t index, Workspace& space) const {
    const int64_t begin = part.begin + index / part.blocks * kPanel, tokens = std::min(kPanel, part.end - begin);
    if (space.begin != begin) space.inputs = as_inputs(x + begin * n, tokens, n, space.room), space.begin = begin;
    space.sums.resize(std::max(space.sums.size(), static_cast<size_t>(tokens * kVectors * kLanes)));
    const int64_t start = (part.from / kVectors + index % part.blocks) * kVectors, width = std::min<int64_t>(kVectors, vectors - start);
    const int64_t vector = std::max(start, part.from), count = std::min(start + width, part.to) - vector;
    const Value* rows = w + start * kLanes * n + (vector - start) * 2 * kLanes;
    block(space.inputs, y + begin * m, tokens, rows, width * 2 * kLanes, static_cast<int>(count), vector, space.sums.data());
  }

  // `tokens` tokens and `count` neighbouring registers of one block, whose pairs of inputs are `stride` apart.
  void block(const Input* inputs, Value* outputs, int64_t tokens, const Value* rows, int64_t stride, int count, int64_t vector,
             float* sums) const {
    const int64_t depth = tokens > kTokens ? std::min(n, kDepth) : n;
    const int64_t shares = kShared ? (tokens + kTokens - 1) / kTokens : 1;  // one tile cannot ask for all that the next block needs
    for (int64_t k = 0; k < n; k += depth) {
      const bool last = k + depth >= n;
      const Value* here = rows + k / 2 * stride;
      const int64_t pairs = std::min(depth, n - k) / 2, step = stride * static_cast<int64_t>(sizeof(Value)) / shares;
      const char* next = reinterpret_cast<const char*>(here) + (shares == 1 ? kAhead : pairs * stride * static_cast<int64_t>(sizeof(Value)));
      for (int64_t token = 0; token < tokens; token += kTokens) {
        const int some = static_cast<int>(std::min<int64_t>(kTokens, tokens - token));
        float* into = sums + (depth < n ? token * count * kLanes : 0);
        const Input* x = inputs + token * n + offset(k, some);
        kTiles[count - 1][some - 1](here, stride, x, n, pairs, into, k == 0, next, step);
        if (last) store(into, some, count, bias, outputs + token * m, m, vector * kLanes);
        if (shares > 1) next += pairs * step;
      }
    }
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t m) {
  const int64_t n = x.size(-1), vectors = (m + kLanes - 1) / kLanes;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "lrserve::packed_linear multiplies bfloat16");
  TORCH_CHECK(n % 2 == 0 && weight.dim() == 2 && weight.size(0) == vectors * kLanes && weight.size(1) == n && weight.is_contiguous(),
              "lrserve::packed_linear: weight is not packed for ", m, " x ", n);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() && bias->numel() == m),
              "lrserve::packed_linear: bias is not ", m, " values in bfloat16");
  const at::Tensor rows = x.contiguous();
  c10::DimVector sizes(x.sizes());
  sizes.back() = m;
  at::Tensor y = at::detail::empty_cpu(sizes, x.options());
  const int64_t tokens = n == 0 ? 0 : rows.numel() / n;
  const Product product{rows.const_data_ptr<Value>(), weight.const_data_ptr<Value>(),
                        bias ? bias->const_data_ptr<Value>() : nullptr, y.mutable_data_ptr<Value>(), n, m, vectors};
  if (tokens == 0 || vectors == 0) return y;

  // Divide the rows of W by `across` and the tokens by `down`, so that the busiest thread has least to do.
  const int64_t threads = omp_get_max_threads(), groups = (tokens + kTokens - 1) / kTokens;
  int64_t down = 1, least = INT64_MAX;
  for (int64_t i = 1; i <= std::min(threads, groups); ++i) {
    const int64_t across = std::min(threads / i, vectors);
    const int64_t busiest = ((vectors + across - 1) / across) * ((groups + i - 1) / i);
    if (busiest < least) least = busiest, down = i;
  }
  const int64_t across = std::min(threads / down, vectors);
  std::vector<Part> parts(across * down);
  for (int64_t i = 0; i < across * down; ++i) {
    const int64_t column = i % across, row = i / across;
    parts[i].set(std::min(tokens, groups * row / down * kTokens), std::min(tokens, groups * (row + 1) / down * kTokens),
                 vectors * column / across, vectors * (column + 1) / across);
  }
  const size_t count = parts.size();
#pragma omp parallel  // as many threads as everywhere: libgomp ends those that a smaller team leaves out
  {
    static thread_local Workspace space;  // kept: a decode step has a hundred products
    space.begin = -1;
    const size_t own = omp_get_thread_num(), team = omp_get_num_threads();
    const size_t reach = team < count ? count : std::min(count, kReach);
    for (size_t i = 0; i < reach; ++i) {
      Part& part = parts[(own + i) % count];
      for (int64_t index; (index = part.take(i > 0 || own >= count)) >= 0;) product.piece(part, index, space);
    }
  }
  return y;
}

}  // namespace

// The same for a graph that torch.compile has written in C++: linear.py tells it of this function.
extern "C" AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, int64_t m,
                                                       AtenTensorHandle* y) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *y = new_tensor_handle(linear(*tensor_handle_to_tensor_pointer(x), *tensor_handle_to_tensor_pointer(weight),
                                  pointer_to_optional<at::Tensor>(bias), m));
  })
}

TORCH_LIBRARY_FRAGMENT(lrserve, library) {
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int m) -> Tensor");
}

TORCH_LIBRARY_IMPL(lrserve, CPU, library) { library.impl("packed_linear", linear); }

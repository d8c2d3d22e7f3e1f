// y = x W^T + b in bfloat16 with AVX-512's dot products of pairs (VDPBF16PS), accumulated in float32. serving/linear.py builds it.
//
// W (m, n) is packed for it: 48 rows are one block (the last one has 16, 32 or 48, filled up with zeros), and in a block the values
// of two neighbouring inputs stand together: [block][n / 2][rows of the block][2]. So a vector register holds 16 rows of one pair of
// inputs, a thread reads its weights from the first byte to the last, and one layout serves one token and a thousand.
//
// A tile is up to 8 tokens by 48 rows, whose 24 sums stay in registers. Threads divide vectors of 16 rows, and where there are too few
// of those also the tokens.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using Value = c10::BFloat16;

constexpr int kLanes = 16;        // rows of W in a register
constexpr int kVectors = 3;       // registers of a block
constexpr int kTokens = 8;        // of a tile
constexpr int64_t kPanel = 512;   // tokens that pass through all of a thread's weights at a time: their x is to stay in a cache
constexpr int64_t kDepth = 4096;  // inputs that do so, if there is more than one tile: so is a block of W
constexpr int64_t kAhead = 4096;  // bytes of weights that are asked for in advance, for one token

// Adds (or, at first, writes) the products of R tokens and V registers of rows over `pairs` pairs of inputs to sums [R][16 V].
template <int R, int V>
void tile(const Value* w, int64_t stride, const Value* x, int64_t n, int64_t pairs, float* sums, bool first) {
  constexpr int kChains = R * V >= 6 ? 1 : R * V >= 3 ? 2 : 4;  // additions wait for each other: keep several under way
  __m512 sum[kChains][R][V];
  for (int u = 0; u < kChains; ++u)
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v)
        sum[u][i][v] = u || first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (i * V + v) * kLanes);
  const auto add = [&](int64_t pair, auto& into) {
    const Value* here = w + pair * stride;
    __m512bh rows[V];
    for (int v = 0; v < V; ++v) {
      // Weights that pass but once are to leave the caches to what a step needs again. From two tokens on, asking costs more.
      if constexpr (R == 1) _mm_prefetch(reinterpret_cast<const char*>(here + 2 * kLanes * v) + kAhead, _MM_HINT_NTA);
      rows[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(here + 2 * kLanes * v));
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      int32_t both;
      std::memcpy(&both, x + i * n + 2 * pair, sizeof both);
      const auto token = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
      for (int v = 0; v < V; ++v) into[i][v] = _mm512_dpbf16_ps(into[i][v], rows[v], token);
    }
  };
  int64_t pair = 0;
  for (; pair + kChains <= pairs; pair += kChains)
#pragma GCC unroll 4
    for (int u = 0; u < kChains; ++u) add(pair + u, sum[u]);
  for (; pair < pairs; ++pair) add(pair, sum[0]);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      for (int u = 1; u < kChains; ++u) sum[0][i][v] = _mm512_add_ps(sum[0][i][v], sum[u][i][v]);
      _mm512_storeu_ps(sums + (i * V + v) * kLanes, sum[0][i][v]);
    }
}

using Tile = void (*)(const Value*, int64_t, const Value*, int64_t, int64_t, float*, bool);

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
      _mm256_mask_storeu_epi16(y + i * m + row, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
  }
}

struct Product {
  const Value *x, *w, *bias;
  Value* y;
  int64_t n, m, vectors;

  // Tokens [begin, end), registers of rows [from, to).
  void part(int64_t begin, int64_t end, int64_t from, int64_t to) const {
    std::vector<float> sums(std::min(end - begin, kPanel) * kVectors * kLanes);
    for (int64_t panel = begin; panel < end; panel += kPanel) {
      const int64_t stop = std::min(panel + kPanel, end);
      for (int64_t vector = from; vector < to;) {
        const int64_t start = vector / kVectors * kVectors;
        const int64_t width = std::min<int64_t>(kVectors, vectors - start);
        const int count = static_cast<int>(std::min(start + width, to) - vector);
        block(panel, stop, w + start * kLanes * n + (vector - start) * 2 * kLanes, width * 2 * kLanes, count, vector, sums.data());
        vector += count;
      }
    }
  }

  // Tokens [begin, end) and `count` neighbouring registers of one block, whose pairs of inputs are `stride` apart.
  void block(int64_t begin, int64_t end, const Value* rows, int64_t stride, int count, int64_t vector, float* sums) const {
    const int64_t depth = end - begin > kTokens ? std::min(n, kDepth) : n;
    for (int64_t k = 0; k < n; k += depth) {
      const bool last = k + depth >= n;
      for (int64_t token = begin; token < end; token += kTokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(kTokens, end - token));
        float* here = sums + (depth < n ? (token - begin) * count * kLanes : 0);
        kTiles[count - 1][tokens - 1](rows + k / 2 * stride, stride, x + token * n + k, n, std::min(depth, n - k) / 2, here, k == 0);
        if (last) store(here, tokens, count, bias, y + token * m, m, vector * kLanes);
      }
    }
  }
};

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, int64_t m) {
  const int64_t n = x.size(-1), vectors = (m + kLanes - 1) / kLanes;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "lrserve::linear multiplies bfloat16");
  TORCH_CHECK(n % 2 == 0 && weight.dim() == 2 && weight.size(0) == vectors * kLanes && weight.size(1) == n && weight.is_contiguous(),
              "lrserve::linear: weight is not packed for ", m, " x ", n);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() && bias->numel() == m),
              "lrserve::linear: bias is not ", m, " values in bfloat16");
  const at::Tensor rows = x.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = m;
  at::Tensor y = at::empty(sizes, x.options());
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
#pragma omp parallel for schedule(static, 1) num_threads(across * down)
  for (int64_t part = 0; part < across * down; ++part) {
    const int64_t column = part % across, row = part / across;
    product.part(std::min(tokens, groups * row / down * kTokens), std::min(tokens, groups * (row + 1) / down * kTokens),
                 vectors * column / across, vectors * (column + 1) / across);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrserve, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, int m) -> Tensor");
}

TORCH_LIBRARY_IMPL(lrserve, CPU, library) { library.impl("linear", linear); }

// SPDX-License-Identifier: Apache-2.0
// A tile of kTileRows x kTileCols outputs keeps its 16-lane sums in registers while it walks along K; every output,
// in a full tile or a remainder, goes through tile() and so through the same arithmetic.
//
// Few rows (one row tile): w is read where it lies, bfloat16 widened in registers; the call is bound by reading w.
// More rows: x is packed once, w a column tile at a time into a panel that stays in L1 and serves all rows. K is walked
// in blocks of kBlockSteps runs so that one x tile and one w panel fit L1 together; sums wait in memory in between.
#include "cpu/linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/rope.h"
#include "cpu/simd.h"

namespace vericache::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileCols = 4;  // 24 sums + 4 of w + 1 of x in 32 registers
#else
constexpr int kTileRows = 3, kTileCols = 2;  // 12 of 16 half-width registers
#endif
constexpr int kBlockSteps = 48;                 // runs of 16 along K a block: 12 KiB of w, 18 KiB of x
constexpr int64_t kRowBlockBytes = 640 * 1024;  // of packed x: what stays in L2 while the column tiles pass
constexpr int64_t kGrainFlops = 1 << 17;        // below this a thread costs more than it brings

// Where a tile finds w: packed [steps, C, 16] float32, or C rows of the matrix itself.
template <int C>
struct PackedW {
  const float* panel;
  f32x16 get(int64_t step, int col) const { return load(panel + (step * C + col) * kLanes); }
};

template <class T>
struct DirectW {
  const T* w;
  int64_t k;
  f32x16 get(int64_t step, int col) const { return load(w + col * k + step * kLanes); }
  f32x16 get_tail(int64_t step, int col) const {
    return load_partial(w + col * k + step * kLanes, int(k - step * kLanes));
  }
};

// sums[r][c] += the lane-wise products of `steps` runs. x is packed [steps, R, 16].
template <int R, int C, class W>
inline void tile(f32x16 (&sums)[R][C], const float* x, const W& w, int64_t first, int64_t last) {
  f32x16 acc[R][C];  // a copy whose address nobody else has: it stays in registers
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = sums[r][c];
  for (int64_t step = first; step < last; ++step) {
    f32x16 wv[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) wv[c] = w.get(step, c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      f32x16 xv = load(x + (step * R + r) * kLanes);
      hold(xv);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fma(xv, wv[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = acc[r][c];
}

template <int R, int C, class T>
inline void tile_tail(f32x16 (&sums)[R][C], const float* x, const DirectW<T>& w, int64_t step) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = fma(load(x + (step * R + r) * kLanes), w.get_tail(step, c), sums[r][c]);
}

#if defined(__AVX512F__)
// hsum of sixteen registers at once, by the same tree: fold halves while merging pairs of registers.
inline f32x16 hsum16(const f32x16* s) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // i + 8
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[2 * i].v, s[2 * i + 1].v, 0x44),
                         _mm512_shuffle_f32x4(s[2 * i].v, s[2 * i + 1].v, 0xee));
  for (int i = 0; i < 4; ++i)  // i + 4
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  for (int i = 0; i < 2; ++i)  // i + 2: the quarters of b[i] are sums 4i .. 4i+3 of the inputs
    c[i] =
        _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  // i + 1
  const __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
  // Element (quarter q, j) of d is the sum of input 4 j + q.
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), d);
}
#endif

// (sum + bias) + residual in float32, then the one rounding.
template <class T, int R, int C>
void finish(const LinearParams& p, int64_t row, int64_t col, const f32x16 (&sums)[R][C]) {
  constexpr int kPadded = (R * C + kLanes - 1) / kLanes * kLanes;
  const f32x16* flat = &sums[0][0];
  float values[kPadded] = {};
  int done = 0;
#if defined(__AVX512F__)
  for (; done + kLanes <= R * C; done += kLanes) store(values + done, hsum16(flat + done));
#endif
  for (; done < R * C; ++done) values[done] = hsum(flat[done]);

  if (p.bias != nullptr) {
    const T* bias = static_cast<const T*>(p.bias) + col;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) values[r * C + c] += to_float(bias[c]);
  }
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride_row + col;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) values[r * C + c] += to_float(residual[r * p.residual_stride_row + c]);
  }
  if (p.out_float32) {
    float* out = static_cast<float*>(p.out) + row * p.out_stride_row + col;
    for (int r = 0; r < R; ++r) std::memcpy(out + r * p.out_stride_row, values + r * C, C * sizeof(float));
    return;
  }
  T rounded[kPadded];
  for (int i = 0; i < kPadded; i += kLanes) store(rounded + i, load(values + i));
  T* out = static_cast<T*>(p.out) + row * p.out_stride_row + col;
  for (int r = 0; r < R; ++r) std::memcpy(out + r * p.out_stride_row, rounded + r * C, C * sizeof(T));
}

// x rows [row, row + R) to [steps, R, 16] float32, the last run padded with zeros.
template <class T>
void pack_x(const LinearParams& p, int64_t row, int rows, float* out) {
  for (int r = 0; r < rows; ++r) {
    const T* x = static_cast<const T*>(p.x) + (row + r) * p.x_stride_row;
    for_lanes(p.k, [&](int64_t k, int n) { store(out + (k / kLanes * rows + r) * kLanes, load_n(x + k, n)); });
  }
}

// w rows [col, col + C) to [steps, C, 16] float32.
template <class T, int C>
void pack_w(const LinearParams& p, int64_t col, float* out) {
  for (int c = 0; c < C; ++c) {
    const T* w = static_cast<const T*>(p.w) + (col + c) * p.k;
    for_lanes(p.k, [&](int64_t k, int n) { store(out + (k / kLanes * C + c) * kLanes, load_n(w + k, n)); });
  }
}

// One row tile, w read in place.
template <class T, int R, int C>
void direct_tile(const LinearParams& p, const float* x, int64_t row, int64_t col) {
  const DirectW<T> w{static_cast<const T*>(p.w) + col * p.k, p.k};
  f32x16 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = f32x16(0.0f);
  const int64_t whole = p.k / kLanes;
  tile<R, C>(sums, x, w, 0, whole);
  if (whole * kLanes < p.k) tile_tail<R, C>(sums, x, w, whole);
  finish<T, R, C>(p, row, col, sums);
}

// One row tile of one K block; `carry` [R, C, 16] holds the sums between blocks.
template <class T, int R, int C>
void packed_tile(const LinearParams& p, const float* x, const float* panel, float* carry, int64_t row, int64_t col,
                 int64_t first, int64_t last, int64_t steps) {
  f32x16 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = first == 0 ? f32x16(0.0f) : load(carry + (r * C + c) * kLanes);
  tile<R, C>(sums, x, PackedW<C>{panel}, first, last);
  if (last == steps) return finish<T, R, C>(p, row, col, sums);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(carry + (r * C + c) * kLanes, sums[r][c]);
}

// f(integral_constant) with n, 1 <= n <= Max, as a compile-time constant.
template <int Max, class F>
void with_size(int n, F&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_size<Max - 1>(n, f);
  }
  f(std::integral_constant<int, Max>{});
}

// Cache-line aligned floats, not initialized.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(::operator new(size_t(floats) * 4, std::align_val_t{64}))) {}
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> memory_;
};

template <class T>
void run(const LinearParams& p) {
  const int64_t steps = (p.k + kLanes - 1) / kLanes;
  const int64_t row_tiles = (p.rows + kTileRows - 1) / kTileRows, col_tiles = (p.n + kTileCols - 1) / kTileCols;
  const int64_t tile_floats = steps * kTileRows * kLanes;
  const auto rows_of = [&](int64_t t) { return int(std::min<int64_t>(kTileRows, p.rows - t * kTileRows)); };
  const auto cols_of = [&](int64_t t) { return int(std::min<int64_t>(kTileCols, p.n - t * kTileCols)); };

  const Scratch x(row_tiles * tile_floats);
  parallel_for(row_tiles, 1 + (1 << 15) / tile_floats, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pack_x<T>(p, t * kTileRows, rows_of(t), x.get() + t * tile_floats);
  });

  const int64_t grain = 1 + kGrainFlops / (2 * kTileCols * p.k * p.rows);
  if (row_tiles == 1) {
    parallel_for(col_tiles, grain, [&](int64_t begin, int64_t end) {
      with_size<kTileRows>(p.rows, [&](auto rows) {
        for (int64_t c = begin; c < end; ++c)
          with_size<kTileCols>(cols_of(c),
                               [&](auto cols) { direct_tile<T, rows(), cols()>(p, x.get(), 0, c * kTileCols); });
      });
    });
    return;
  }

  const int64_t block_tiles = std::max<int64_t>(1, kRowBlockBytes / (tile_floats * 4));
  constexpr int kCarry = kTileRows * kTileCols * kLanes;
  parallel_for(col_tiles, grain, [&](int64_t begin, int64_t end) {
    const Scratch panel(steps * kTileCols * kLanes), carry(std::min(block_tiles, row_tiles) * kCarry);
    for (int64_t t0 = 0; t0 < row_tiles; t0 += block_tiles) {
      const int64_t t1 = std::min(row_tiles, t0 + block_tiles);
      for (int64_t c = begin; c < end; ++c)
        with_size<kTileCols>(cols_of(c), [&](auto cols) {
          pack_w<T, cols()>(p, c * kTileCols, panel.get());
          for (int64_t s = 0; s < steps; s += kBlockSteps)
            for (int64_t t = t0; t < t1; ++t)
              with_size<kTileRows>(rows_of(t), [&](auto rows) {
                packed_tile<T, rows(), cols()>(p, x.get() + t * tile_floats, panel.get(),
                                               carry.get() + (t - t0) * kCarry, t * kTileRows, c * kTileCols, s,
                                               std::min<int64_t>(steps, s + kBlockSteps), steps);
              });
        });
    }
  });
}

// The product alone, to memory of its own.
template <class T>
std::unique_ptr<T[]> run_apart(LinearParams p) {
  auto product = std::make_unique_for_overwrite<T[]>(size_t(p.rows) * size_t(p.n));
  p.swiglu = false;
  p.out = product.get();
  p.out_stride_row = p.n;
  run<T>(p);
  return product;
}

template <class T>
void run_swiglu(const LinearParams& p) {
  const auto product = run_apart<T>(p);
  silu_mul({product.get(), p.out, p.n, p.rows, p.n / 2, p.dtype});
}

}  // namespace

void linear(const LinearParams& p) {
  if (p.rows == 0 || p.n == 0) return;
  dispatch(p.dtype, [&](auto t) { p.swiglu ? run_swiglu<decltype(t)>(p) : run<decltype(t)>(p); });
}

void linear_rope_write(const LinearRopeWriteParams& p) {
  if (p.product.rows == 0) return;
  dispatch(p.product.dtype, [&](auto t) {
    const auto qkv = run_apart<decltype(t)>(p.product);
    RopeWriteParams rope = p.rope;
    rope.qkv = qkv.get();
    rope.qkv_stride_row = p.product.n;
    rope_write(rope);
  });
}

}  // namespace vericache::cpu

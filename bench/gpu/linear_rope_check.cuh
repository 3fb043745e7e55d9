// SPDX-License-Identifier: Apache-2.0
// The checks of linear_rope_write, for dense_check.
#pragma once

#include "linear_check.cuh"

namespace vericache::bench {

// linear_rope_write is bit for bit rope_write of the plain product, q and pages alike, at all row counts, with QK-norm
// and without.
template <class T>
void rope_equality(Report& report, int q_heads, int kv_heads, int head_dim, int k, DType dtype, bool quick) {
  constexpr int kPageSize = 16, kPositions = 300;
  const int all_rows = quick ? 67 : 140, n = (q_heads + 2 * kv_heads) * head_dim, half = head_dim / 2;
  const size_t page_bytes = size_t(2) * kv_heads * kPageSize * head_dim * sizeof(T);
  const size_t q_bytes = size_t(q_heads) * head_dim * sizeof(T);
  const Buffer x = random_buffer<T>(size_t(all_rows) * k, 61), w = random_buffer<T>(size_t(n) * k, 62, 0.05f);
  const Buffer bias = random_buffer<T>(n, 63), product(size_t(all_rows) * n * sizeof(T)), workspace(product.bytes());
  const Buffer norms = random_buffer<T>(size_t(2) * head_dim, 66);
  const Buffer cos = random_buffer<float>(size_t(kPositions) * half, 64);
  const Buffer sin = random_buffer<float>(size_t(kPositions) * half, 65);
  const Buffer want_q(all_rows * q_bytes), got_q(all_rows * q_bytes + 64);
  const Buffer want_pages(all_rows * page_bytes), got_pages(all_rows * page_bytes);
  Rng rng(7);
  uint64_t different = 0;
  bool guard = true, control = true;
  workspace.poison();
  for (int rows = 1; rows <= all_rows; rows += quick ? 33 : 1) {
    std::vector<int> slot(rows);  // of each row, in another order every time
    std::iota(slot.begin(), slot.end(), 0);
    std::shuffle(slot.begin(), slot.end(), rng);
    std::vector<int32_t> position(rows), next(rows);
    std::vector<int64_t> want_page(rows), got_page(rows);
    for (int r = 0; r < rows; ++r) {
      position[r] = int32_t(rng() % kPositions), next[r] = (position[r] + 1) % kPositions;
      const bool write = r % 5 != 3;
      want_page[r] = write ? want_pages.address() + int64_t(slot[r] * page_bytes) : 0;
      got_page[r] = write ? got_pages.address() + int64_t(slot[r] * page_bytes) : 0;
    }
    const Buffer d_position = upload(position), d_next = upload(next);
    const Buffer d_want = upload(want_page), d_got = upload(got_page);
    RopeWriteParams rope{};
    rope.qkv = product.get(), rope.cos = cos.get<float>(), rope.sin = sin.get<float>();
    rope.row_position = d_position.get<int32_t>(), rope.row_page = d_want.get<int64_t>(), rope.q_out = want_q.get();
    rope.qkv_stride_row = n, rope.rows = rows, rope.q_heads = q_heads, rope.kv_heads = kv_heads;
    rope.head_dim = head_dim, rope.page_size = kPageSize, rope.dtype = dtype, rope.eps = 1e-6f;
    if (rows % 4 == 1 || rows % 4 == 2) rope.q_norm = norms.get<T>();
    if (rows % 4 == 1 || rows % 4 == 3) rope.k_norm = norms.get<T>() + head_dim;
    LinearRopeWriteParams fused{linear_params(x.get(), w.get(), nullptr, rows, n, k, dtype, false), rope,
                                workspace.get()};
    fused.product.bias = rows % 3 == 0 ? bias.get() : nullptr;
    fused.product.w_settled = rows % 2 == 0;
    fused.rope.qkv = nullptr, fused.rope.row_page = d_got.get<int64_t>(), fused.rope.q_out = got_q.get();
    got_q.poison(), got_pages.poison(), want_pages.poison();
    if (cuda::linear_rope_write_workspace_bytes(fused) > workspace.bytes()) throw Error("the workspace is too small");
    cuda::linear_rope_write(fused, nullptr);
    LinearParams plain = fused.product;
    plain.out = product.get();
    cuda::linear(plain, nullptr);
    cuda::rope_write(rope, nullptr);
    different += differences(got_q.get(), want_q.get(), nullptr, rows, q_bytes);
    different += differences(got_pages.get(), want_pages.get(), nullptr, all_rows, page_bytes);
    const auto host = got_q.template to_host<uint16_t>();
    for (size_t i = rows * q_bytes / 2; i < host.size(); ++i) guard &= host[i] == 0xffff;
    // Control: each row at the next position.
    rope.row_position = d_next.get<int32_t>();
    cuda::rope_write(rope, nullptr);
    control &= differences(got_q.get(), want_q.get(), nullptr, rows, q_bytes) > 0 &&
               differences(got_pages.get(), want_pages.get(), nullptr, all_rows, page_bytes) > 0;
  }
  report.check(text("linear_rope_", q_heads, "+", kv_heads, "x", head_dim, "_", k, "_", dtype_name(dtype)),
               different == 0 && guard && control,
               text(different, " differ from rope_write(linear) at 1 to ", all_rows, " rows, guard ",
                    guard ? "intact" : "overwritten", ", control ", control ? "seen" : "missed"));
}

inline void linear_rope_checks(Report& report, bool quick) {
  struct Heads {
    int q, kv, dim, k;
  };
  // Narrow tiles of three heads, the last full or not; of two, of each head size, with a last tile that is not full and
  // more blocks than multiprocessors. Then k in 2, 2 and 1 parts; no fused form; a k for linear_simple.
  for (const Heads& h :
       {Heads{32, 8, 128, 4096}, Heads{12, 6, 256, 4096}, Heads{24, 5, 128, 4096}, Heads{28, 4, 128, 3584},
        Heads{56, 4, 64, 4096}, Heads{13, 3, 128, 2048}, Heads{25, 4, 128, 4096}, Heads{40, 8, 128, 5120},
        Heads{64, 8, 128, 5120}, Heads{16, 4, 128, 1024}, Heads{14, 2, 64, 896}, Heads{64, 64, 128, 128},
        Heads{20, 4, 256, 128}, Heads{5, 1, 64, 72}, Heads{6, 2, 80, 512}, Heads{3, 1, 128, 61}})
    // Of the small ones that with k = 1024 is for narrow tiles up to 64 rows, and for linear.cu's split ones beyond.
    if (!quick || h.k <= 128 || h.k == 1024)
      rope_equality<__nv_bfloat16>(report, h.q, h.kv, h.dim, h.k, DType::kBFloat16, quick);
  rope_equality<float>(report, 3, 1, 64, 72, DType::kFloat32, quick);
}

}  // namespace vericache::bench

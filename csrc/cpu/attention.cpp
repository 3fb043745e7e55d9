// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/types.h"
#include "cpu/attention_tiles.h"
#include "cpu/parallel.h"

namespace vericache::cpu {
namespace {

constexpr int kMaxUnits = 128;      // of a block: enough to hide the conversion of a tile, few enough for the L2 cache
constexpr int kTasksPerThread = 4;  // so that uneven tasks even out
constexpr int64_t kMinSplits = 4;   // of a task

// Consecutive rows of one request with one KV head; unit u is row u / group, head u % group.
struct Block {
  int request, kv_head, first_row, rows;
  int64_t first_split = 0, last_split = 0;  // one past; the splits that some row attends to
  int64_t saved_state = -1;                 // where the states of its first split are kept, if they are
};

struct Task {
  int block;
  int64_t first_split, last_split;
};

// The part of a unit's keys that lies in a split, relative to its start; empty if begin >= end.
struct SplitRange {
  int begin, end;
};

SplitRange clip(const KeyRanges& r, int64_t split) {
  const int64_t start = split * kSplit;
  const bool tail = r.tail_begin < r.tail_end && start >= r.tail_begin;
  const int64_t begin = (tail ? r.tail_begin : r.begin) - start, end = (tail ? r.tail_end : r.end) - start;
  return {int(std::clamp<int64_t>(begin, 0, kSplit)), int(std::clamp<int64_t>(end, 0, kSplit))};
}

// One softmax state a unit.
struct States {
  SoftmaxState* state;  // [units]
  float* o;             // [units, head_dim]
};

// A thread's buffers, kept from call to call.
struct Scratch {
  std::vector<float> memory;
  std::vector<SoftmaxState> states;
  std::vector<KeyRanges> keys;     // [kMaxUnits]
  std::vector<SplitRange> ranges;  // [kMaxUnits], of the split at hand
  float* q;                        // [kMaxUnits, head_dim], times scale * log2(e)
  float* scores;                   // [kMaxUnits, kSplit]
  float* key_tile;                 // [head_dim, kTileKeys]
  float* value_tile;               // [kTileKeys, head_dim]
  States split, total;

  void fit(int head_dim) {
    const size_t per_unit = size_t(3 * head_dim + kSplit), tiles = size_t(2 * head_dim * kTileKeys);
    memory.resize(std::max(memory.size(), kMaxUnits * per_unit + tiles + kLanes));
    states.resize(2 * kMaxUnits);
    keys.resize(kMaxUnits);
    ranges.resize(kMaxUnits);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    float* next = memory.data() + (64 - start % 64) % 64 / sizeof(float);
    const auto take = [&](int64_t size) { return std::exchange(next, next + size); };
    scores = take(kMaxUnits * kSplit);
    key_tile = take(int64_t(head_dim) * kTileKeys);
    value_tile = take(int64_t(head_dim) * kTileKeys);
    q = take(kMaxUnits * head_dim);
    split = {states.data(), take(kMaxUnits * head_dim)};
    total = {states.data() + kMaxUnits, take(kMaxUnits * head_dim)};
  }
};

class Attention {
 public:
  explicit Attention(const AttentionJob& job) : job_(job), group_(job.q_heads / job.kv_heads) {}

  void run() {
    zero_rows(job_.row_offsets[job_.requests], job_.rows);
    make_blocks();
    make_tasks();
    std::atomic<size_t> next{0};
    parallel_for(num_threads(), 1, [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      scratch.fit(job_.head_dim);
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) run_task(tasks_[i], scratch);
    });
    for (const Block& block : blocks_)
      if (block.saved_state >= 0) merge_saved(block);
  }

 private:
  int units(const Block& b) const { return b.rows * group_; }
  KeyRanges keys_of(const Block& b, int row) const { return job_.keys(b.request, b.kv_head, b.first_row + row); }

  void make_blocks() {
    const int block_rows = std::max(1, kMaxUnits / group_);
    for (int r = 0; r < job_.requests; ++r)
      for (int first = job_.row_offsets[r]; first < job_.row_offsets[r + 1]; first += block_rows)
        for (int h = 0; h < job_.kv_heads; ++h) {
          Block b{r, h, first, std::min(block_rows, job_.row_offsets[r + 1] - first)};
          bool any = false;
          for (int row = 0; row < b.rows; ++row) {
            const KeyRanges keys = keys_of(b, row);
            if (keys.empty()) continue;
            const int64_t first_split = keys.first() / kSplit, last_split = (keys.last() - 1) / kSplit + 1;
            b.first_split = any ? std::min(b.first_split, first_split) : first_split;
            b.last_split = any ? std::max(b.last_split, last_split) : last_split;
            any = true;
          }
          blocks_.push_back(b);
        }
  }

  // Where there are fewer blocks than the threads need, the splits of a block are shared out and their states kept.
  void make_tasks() {
    const int64_t blocks = int64_t(blocks_.size()), wanted = int64_t(kTasksPerThread) * num_threads();
    int64_t saved = 0;
    for (int i = 0; i < blocks; ++i) {
      Block& b = blocks_[size_t(i)];
      const int64_t splits = b.last_split - b.first_split;
      const int64_t share = std::max((splits * blocks + wanted - 1) / wanted, kMinSplits);
      if (share < splits) {
        b.saved_state = saved;
        saved += splits * units(b);
        for (int64_t s = b.first_split; s < b.last_split; s += share)
          tasks_.push_back({i, s, std::min(s + share, b.last_split)});
      } else {
        tasks_.push_back({i, b.first_split, b.last_split});
      }
    }
    if (saved > 0) {
      saved_states_.resize(size_t(saved));
      saved_o_.reset(new float[size_t(saved * job_.head_dim)]);
    }
  }

  States saved(const Block& b, int64_t split) const {
    const int64_t at = b.saved_state + (split - b.first_split) * units(b);
    return {const_cast<SoftmaxState*>(saved_states_.data()) + at, saved_o_.get() + at * job_.head_dim};
  }

  void run_task(const Task& task, Scratch& s) {
    const Block& b = blocks_[size_t(task.block)];
    const std::unique_ptr<KeySource> source = job_.source(b.request, b.kv_head);
    for (int row = 0; row < b.rows; ++row) std::fill_n(&s.keys[size_t(row * group_)], group_, keys_of(b, row));
    dispatch(job_.dtype, [&](auto t) { load_q<decltype(t)>(b, s.q); });
    if (b.saved_state < 0) clear(s.total, units(b));
    for (int64_t split = task.first_split; split < task.last_split; ++split) {
      for (int u = 0; u < units(b); ++u) s.ranges[size_t(u)] = clip(s.keys[size_t(u)], split);
      const States out = b.saved_state < 0 ? s.split : saved(b, split);
      attend_split(*source, s, units(b), split, out);
      if (b.saved_state < 0)
        for (int u = 0; u < units(b); ++u) merge_unit(s.ranges[size_t(u)], s.total, out, u);
    }
    if (b.saved_state < 0) write_out(b, 0, units(b), s.total);
  }

  void merge_saved(const Block& b) {
    parallel_for(units(b), 4, [&](int64_t begin, int64_t end) {
      thread_local Scratch s;
      s.fit(job_.head_dim);
      clear(s.total, units(b));
      for (int64_t u = begin; u < end; ++u) {
        const KeyRanges keys = keys_of(b, int(u) / group_);
        for (int64_t split = b.first_split; split < b.last_split; ++split)
          merge_unit(clip(keys, split), s.total, saved(b, split), int(u));
      }
      write_out(b, int(begin), int(end), s.total);
    });
  }

  void merge_unit(SplitRange range, States left, States right, int u) const {
    if (range.begin >= range.end) return;
    const int64_t at = int64_t(u) * job_.head_dim;
    merge(left.state[u], left.o + at, right.state[u], right.o + at, job_.head_dim);
  }

  void clear(States s, int units) const {
    std::fill_n(s.state, units, SoftmaxState{});
    std::fill_n(s.o, int64_t(units) * job_.head_dim, 0.0f);
  }

  // Softmax states of the units over their ranges of one split.
  void attend_split(const KeySource& source, Scratch& s, int units, int64_t split, States out) const {
    int begin = kSplit, end = 0;  // of all units together
    for (int u = 0; u < units; ++u) {
      if (s.ranges[size_t(u)].begin >= s.ranges[size_t(u)].end) continue;
      begin = std::min(begin, s.ranges[size_t(u)].begin);
      end = std::max(end, s.ranges[size_t(u)].end);
    }
    for (int tile = begin / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
      const int first = std::max(begin, tile) / kLanes * kLanes, last = std::min(end, tile + kTileKeys);
      for (int key = first; key < last; key += kLanes)
        source.pack_keys(split * kSplit + key, s.key_tile + (key - tile));
      for (int u = 0; u < units; u += kTileRows) score_rows(s, u, std::min(kTileRows, units - u), tile);
    }
    for (int u = 0; u < units; ++u) {
      const SplitRange r = s.ranges[size_t(u)];
      if (r.begin < r.end) out.state[u] = softmax_row(s.scores + int64_t(u) * kSplit, r.begin, r.end);
    }
    std::fill_n(out.o, int64_t(units) * job_.head_dim, 0.0f);
    for (int tile = begin / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
      const int last = std::min(end, tile + kTileKeys);
      for (int key = std::max(begin, tile); key < last;) {
        const int count = std::min(last, (key / kLanes + 1) * kLanes) - key;
        source.load_values(split * kSplit + key, count, s.value_tile + int64_t(key - tile) * job_.head_dim);
        key += count;
      }
      for (int u = 0; u < units; u += kTileRows) value_rows(s, u, std::min(kTileRows, units - u), tile, out.o);
    }
  }

  // Scores of units u .. u + rows - 1 with the vectors of the tile that any of them needs. The others' lanes are
  // computed along and ignored by softmax_row.
  void score_rows(Scratch& s, int u, int rows, int tile) const {
    int begin = tile + kTileKeys, end = tile;
    for (int r = u; r < u + rows; ++r) {
      const SplitRange range = s.ranges[size_t(r)];
      if (range.begin >= range.end) continue;
      begin = std::min(begin, std::max(range.begin, tile));
      end = std::max(end, std::min(range.end, tile + kTileKeys));
    }
    if (begin >= end) return;
    begin = begin / kLanes * kLanes;
    score_tile(s.q + int64_t(u) * job_.head_dim, s.key_tile + (begin - tile), s.scores + int64_t(u) * kSplit + begin,
               rows, (end - begin + kLanes - 1) / kLanes, job_.head_dim);
  }

  // Weights times values for units u .. u + rows - 1: the keys that all of them attend to together, what lies before
  // and after row by row. A key that a row does not attend to is left out, not multiplied by zero: it may be NaN.
  void value_rows(Scratch& s, int u, int rows, int tile, float* o) const {
    int begin = tile, end = tile + kTileKeys;
    for (int r = u; r < u + rows; ++r) {
      begin = std::max(begin, s.ranges[size_t(r)].begin);
      end = std::min(end, s.ranges[size_t(r)].end);
    }
    const bool together = begin < end;
    const auto product = [&](int first_unit, int count, int from, int to) {
      if (from >= to) return;
      value_tile(s.scores + int64_t(first_unit) * kSplit + from, s.value_tile + int64_t(from - tile) * job_.head_dim,
                 o + int64_t(first_unit) * job_.head_dim, count, to - from, job_.head_dim);
    };
    const auto alone = [&](int from, int to) {
      for (int r = u; r < u + rows; ++r)
        product(r, 1, std::max(from, s.ranges[size_t(r)].begin), std::min(to, s.ranges[size_t(r)].end));
    };
    if (!together) return alone(tile, tile + kTileKeys);
    alone(tile, begin);
    product(u, rows, begin, end);
    alone(end, tile + kTileKeys);
  }

  template <class T>
  void load_q(const Block& b, float* to) const {
    const f32x16 factor(job_.scale * 1.44269504088896341f);
    for (int row = 0; row < b.rows; ++row)
      for (int g = 0; g < group_; ++g, to += job_.head_dim) {
        const T* q = static_cast<const T*>(job_.q) + int64_t(b.first_row + row) * job_.q_stride_row +
                     int64_t(b.kv_head * group_ + g) * job_.q_stride_head;
        for (int d = 0; d < job_.head_dim; d += kLanes) store(to + d, load(q + d) * factor);
      }
  }

  void write_out(const Block& b, int first_unit, int last_unit, States total) const {
    dispatch(job_.dtype, [&](auto t) {
      for (int u = first_unit; u < last_unit; ++u) {
        const int row = b.first_row + u / group_, head = b.kv_head * group_ + u % group_;
        auto* out = static_cast<decltype(t)*>(job_.out) + (int64_t(row) * job_.q_heads + head) * job_.head_dim;
        const float l = keys_of(b, u / group_).empty() ? 1.0f : total.state[u].l;
        for (int d = 0; d < job_.head_dim; d += kLanes)
          store(out + d, load(total.o + int64_t(u) * job_.head_dim + d) / f32x16(l));
      }
    });
  }

  void zero_rows(int64_t first, int64_t last) const {
    const int64_t row_bytes = int64_t(job_.q_heads) * job_.head_dim * int64_t(dtype_size(job_.dtype));
    if (first < last)
      std::memset(static_cast<char*>(job_.out) + first * row_bytes, 0, size_t((last - first) * row_bytes));
  }

  const AttentionJob& job_;
  const int group_;
  std::vector<Block> blocks_;
  std::vector<Task> tasks_;
  std::vector<SoftmaxState> saved_states_;
  std::unique_ptr<float[]> saved_o_;
};

}  // namespace

void attend(const AttentionJob& job) { Attention(job).run(); }

}  // namespace vericache::cpu

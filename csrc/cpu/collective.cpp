#include "../collective.h"

#include <cstring>
#include <limits>
#include <vector>

#include "meeting.h"
#include "threads.h"

namespace fused_ops {
namespace {

// Rows from `begin` on, one after another.
void copy_rows(const Rows& from, int64_t begin, int64_t count, int64_t row_bytes, char* to) {
  parallel_rows(count, row_bytes / 4, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) std::memcpy(to + r * row_bytes, from.at<char>(begin + r), row_bytes);
  });
}

// How many rows a slot holds. Throws where these are fewer than `least`, which all ranks then do.
int64_t rows_of_slot(Meeting& meeting, int64_t row_bytes, int64_t least) {
  if (row_bytes == 0) return std::numeric_limits<int64_t>::max();
  const int64_t fit = meeting.slot_bytes() / row_bytes;
  if (fit < least) {
    meeting.meet();
    meeting.all_throw();
  }
  STD_TORCH_CHECK(fit >= least, "workspace: a row of ", row_bytes, " bytes doesn't fit into it, expected at most ",
                  meeting.slot_bytes() / least);
  return fit;
}

Rows contiguous(char* data, int64_t count, int64_t cols, int64_t row_bytes) {
  Rows rows;
  rows.data = data;
  rows.count = rows.size[0] = count;
  rows.cols = cols;
  rows.dims = 1;
  rows.stride[0] = row_bytes;
  return rows;
}

// The second half of a two-shot turn: each rank has summed its share of the rows in its own slot, where nobody else
// reads these rows; then all read each share where it was made, as rows of two dimensions.
void sum_shares(Meeting& meeting, Pipeline& p, int64_t most, int64_t row_bytes) {
  const int64_t share = (most + meeting.ranks() - 1) / meeting.ranks(), count = p.rows - p.begin;
  const int64_t begin = std::min(meeting.rank() * share, count), end = std::min(begin + share, count);
  Pipeline sums;
  sums.cols = p.cols;
  sums.dtype = p.dtype;
  sums.x = sums.y = contiguous(meeting.own_slot(), count, p.cols, row_bytes);
  sums.begin = begin;
  sums.rows = end;
  sums.summands = {meeting.slot(0), meeting.ranks(), meeting.rank_bytes(), row_bytes, 0};
  run_rows_on_cpu(sums);
  meeting.meet();
  p.summands = {};
  p.x = contiguous(meeting.slot(0), p.rows, p.cols, row_bytes);
  p.x.dims = 2;
  p.x.size[0] = meeting.ranks();
  p.x.stride[0] = meeting.rank_bytes() + share * row_bytes;
  p.x.size[1] = share;
  p.x.stride[1] = row_bytes;
}

// All rows on every rank, a slot of them a turn.
void run_all(Meeting& meeting, Pipeline& p, int64_t row_bytes) {
  const Rows x = p.x;
  const int64_t rows = p.rows, ranks = meeting.ranks();
  const int64_t fit = rows_of_slot(meeting, row_bytes, 1);
  const int64_t whole = fit < ranks ? fit : fit / ranks * ranks;  // shares, where there are several turns
  const int64_t most = std::max<int64_t>(1, std::min(rows, whole));
  const bool two_shot = ranks > 1 && fit >= ranks && most * row_bytes > meeting.two_shot_above();
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += most, meeting.next()) {
    const int64_t end = std::min(begin + most, rows);
    copy_rows(x, begin, end - begin, row_bytes, meeting.own_slot());
    meeting.meet(two_shot);
    if (begin == 0) prepare_on_cpu(p);
    p.begin = begin;
    p.rows = end;
    p.summands = {meeting.slot(0), ranks, meeting.rank_bytes(), row_bytes, begin};
    if (two_shot) sum_shares(meeting, p, most, row_bytes);
    run_rows_on_cpu(p);
  }
}

// Each rank's own rows, of which as many a turn as make a slot together.
void run_scattered(Meeting& meeting, Pipeline& p, int64_t row_bytes) {
  const int64_t all = p.x.count, own = p.rows, ranks = meeting.ranks();
  const int64_t share = share_of(all, ranks, 0).end;
  const int64_t most = std::max<int64_t>(1, std::min(share, rows_of_slot(meeting, row_bytes, ranks) / ranks));
  for (int64_t begin = 0; begin == 0 || begin < share; begin += most, meeting.next()) {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const Share theirs = share_of(all, ranks, rank);
      const int64_t first = std::min(theirs.begin + begin, theirs.end);
      copy_rows(p.x, first, std::min(most, theirs.end - first), row_bytes,
                meeting.own_slot() + rank * most * row_bytes);
    }
    meeting.meet();
    if (begin == 0) prepare_on_cpu(p);
    p.begin = std::min(begin, own);
    p.rows = std::min(begin + most, own);
    const char* const mine = meeting.slot(0) + meeting.rank() * most * row_bytes;
    p.summands = {mine, ranks, meeting.rank_bytes(), row_bytes, begin};
    run_rows_on_cpu(p);
  }
}

}  // namespace

void run_collective_on_cpu(Pipeline& p) {
  Meeting meeting(p.collective, call_of(p));
  const int64_t row_bytes = p.cols * byte_size(p.dtype);
  p.collective.scattered ? run_scattered(meeting, p, row_bytes) : run_all(meeting, p, row_bytes);
}

void run_pair_on_cpu(Pipeline& q, Pipeline& k) {
  Call call = call_of(q);
  call.other_cols = k.cols;
  call.other_weight = call_of(k).weight;
  Meeting meeting(q.collective, call);
  const int64_t rows = q.rows, ranks = meeting.ranks();
  const int64_t most = std::max<int64_t>(1, std::min(rows, rows_of_slot(meeting, 2 * sizeof(float), 1)));
  std::vector<float> means(2 * most);
  for (int64_t begin = 0; begin == 0 || begin < rows; begin += most, meeting.next()) {
    q.begin = k.begin = begin;
    q.rows = k.rows = std::min(begin + most, rows);
    float* const squares = reinterpret_cast<float*>(meeting.own_slot());
    squares_on_cpu(q, squares);
    squares_on_cpu(k, squares + 1);
    meeting.meet();
    for (int64_t i = 0; i < 2 * (q.rows - begin); ++i) {
      const auto of_rank = [&](int64_t rank) { return reinterpret_cast<const float*>(meeting.slot(rank))[i]; };
      float sum = of_rank(0);
      for (int64_t rank = 1; rank < ranks; ++rank) sum += of_rank(rank);
      means[i] = sum / static_cast<float>(ranks * (i % 2 ? k.cols : q.cols));
    }
    q.norm.mean_square = means.data() - 2 * begin;
    k.norm.mean_square = means.data() - 2 * begin + 1;
    run_rows_on_cpu(q, &k);
  }
}

namespace {

// One row of scales between its layout and a slot, where they lie one after another.
template <bool TO_SLOT>
void copy_scales(const ScaleOut& scale, int64_t row, int64_t groups, char* slot) {
  for (int64_t i = 0; i < groups; ++i, slot += scale.element) {
    char* const at = scale.data + scale.row(row) + i / 4 * scale.four + i % 4 * scale.one;
    TO_SLOT ? std::memcpy(slot, at, scale.element) : std::memcpy(at, slot, scale.element);
  }
}

void zero_behind(const ScaleOut& scale, int64_t row, int64_t groups) {
  for (int64_t i = groups; i % 4; ++i)
    std::memset(scale.data + scale.row(row) + i / 4 * scale.four + i % 4 * scale.one, 0, scale.element);
}

}  // namespace

void run_gather_on_cpu(const Collective& of, const Call& call, const Gather& g) {
  Meeting meeting(of, call);
  const int64_t codes = g.x.cols, ranks = meeting.ranks();
  int64_t row_bytes = codes;
  for (int i = 0; i < g.scales; ++i) row_bytes += g.scale[i].element * g.groups;
  const int64_t share = share_of(call.rows, ranks, 0).end;
  const int64_t most = std::max<int64_t>(1, std::min(share, rows_of_slot(meeting, row_bytes, 1)));
  // Rows [first, last) of a rank, relative to its own.
  const auto each_row = [&](int64_t rank, int64_t begin, const auto& fn) {
    const Share own = share_of(call.rows, ranks, rank);
    if (row_bytes == 0) return;
    const int64_t first = std::min(begin, own.end - own.begin), last = std::min(begin + most, own.end - own.begin);
    parallel_rows(last - first, row_bytes / 4, [&](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) fn(own.begin, first + i, meeting.slot(rank) + i * row_bytes);
    });
  };
  for (int64_t begin = 0; begin == 0 || begin < share; begin += most, meeting.next()) {
    each_row(meeting.rank(), begin, [&](int64_t, int64_t row, char* slot) {
      std::memcpy(slot, g.x.at<char>(row), codes);
      slot += codes;
      for (int i = 0; i < g.scales; ++i) {
        copy_scales<true>(g.scale[i], row, g.groups, slot);
        slot += g.scale[i].element * g.groups;
      }
    });
    meeting.meet();
    if (begin == 0)
      for (const ScaleOut& scale : g.result)
        if (scale.swizzled && scale.extent) std::memset(scale.data, 0, scale.extent);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      each_row(rank, begin, [&](int64_t before, int64_t row, char* slot) {
        std::memcpy(g.y.at<char>(before + row), slot, codes);
        slot += codes;
        for (int i = 0; i < g.scales; ++i) {
          copy_scales<false>(g.result[i], before + row, g.groups, slot);
          slot += g.result[i].element * g.groups;
          if (g.padded) zero_behind(g.result[i], before + row, g.groups);
        }
      });
    }
  }
}

}  // namespace fused_ops

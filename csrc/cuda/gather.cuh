// Rows of every rank, one after another, with the scales that belong to them: exchanged as collective.cuh says.
#pragma once

#include "exchange.cuh"

namespace fused_ops {

template <GatherStages C>
struct Gathered {
  static constexpr long long kScales = whole_packs(C.row_bytes), kSet = whole_packs(C.groups * C.scale_bytes);

  const Gather& g;
  const Ranks& ranks;
  long long slot;

  DEVICE char* row(int rank, long long r) const {
    return ranks.memory[rank] + slot + (r - ranks.begin) * gathered_bytes(C);
  }

  static DEVICE void copy(const char* from, char* to) {
    if constexpr (C.aligned) {
      using Words = Pack<unsigned, 4>;
      for (long long i = threadIdx.x; i < C.row_bytes / 16; i += C.block) ((Words*)to)[i] = ((const Words*)from)[i];
    } else {
      for (long long i = threadIdx.x; i < C.row_bytes; i += C.block) to[i] = from[i];
    }
  }

  static DEVICE char* scale_at(const ScalePlace& place, long long r, int group) {
    char* const data = C.swizzled ? at<true>(place, r) : at<false>(place, r);
    return data + group / 4 * place.four + group % 4 * place.one;
  }
  static DEVICE void copy_scale(const char* from, char* to) {
    if constexpr (C.scale_bytes == 4) {
      *(int*)to = *(const int*)from;
    } else {
      *to = *from;
    }
  }

  // This rank's row r to its slot.
  DEVICE void publish(long long r) const {
    copy(at<false, char>(g.x, r), row(ranks.rank, r));
#pragma unroll
    for (int set = 0; set < C.sets; ++set)
      for (int group = threadIdx.x; group < C.groups; group += C.block)
        copy_scale(scale_at(g.scale[set], r, group), row(ranks.rank, r) + kScales + set * kSet + group * C.scale_bytes);
  }

  // Row r of a rank from its slot; NaN, if its dtype and that of its scales have one, where not all ranks came.
  DEVICE void take(int rank, long long r, bool came) const {
    const long long to = rank * ranks.share + r;
    if (came) {
      copy(row(rank, r), at<false, char>(g.y, to));
    } else {
      for (long long i = threadIdx.x; i < C.row_bytes; i += C.block) at<false, char>(g.y, to)[i] = g.nan;
    }
#pragma unroll
    for (int set = 0; set < C.sets; ++set)
      for (int group = threadIdx.x; group < (C.padded ? (C.groups + 3) / 4 * 4 : C.groups); group += C.block) {
        char* const scale = scale_at(g.result[set], to, group);
        if (group >= C.groups) {
          *scale = 0;
        } else if (came) {
          copy_scale(row(rank, r) + kScales + set * kSet + group * C.scale_bytes, scale);
        } else {
          for (int i = 0; i < C.scale_bytes; ++i) scale[i] = (char)0xff;
        }
      }
  }

  // Rows of scales behind the last.
  DEVICE void complete() const {
    const long long end = (ranks.all + 127) / 128 * 128;
    for (long long r = ranks.all + blockIdx.x; r < end; r += ranks.blocks)
      for (int set = 0; set < C.sets; ++set)
        for (int group = threadIdx.x; group < (C.groups + 3) / 4 * 4; group += C.block)
          *scale_at(g.result[set], r, group) = 0;
  }
};

template <GatherStages C>
DEVICE void run(const Gather& g, const Ranks& ranks) {
  unsigned number;
  bool came = begin_call<C.ranks>(ranks, number);
  const Gathered<C> all{g, ranks, slot_of(ranks, number)};
  const long long first = ranks.begin + blockIdx.x;
  const auto has = [&](int rank, long long r) { return rank * ranks.share + r < ranks.all; };
  if (came) {
    for (long long r = first; r < ranks.end; r += ranks.blocks)
      if (has(ranks.rank, r)) all.publish(r);
    came = exchange<C.ranks>(ranks, number, 0);
  }
  for (long long r = first; r < ranks.end; r += ranks.blocks)
    for (int rank = 0; rank < C.ranks; ++rank)
      if (has(rank, r)) all.take(rank, r, came);
  if constexpr (C.swizzled)
    if (ranks.end == ranks.share) all.complete();
}

}  // namespace fused_ops

// Rows that are summed over ranks, or normed by what all ranks have of them: stages before any of the others.
//
// One-shot: behind the exchange a block reads its rows from all slots, sums them in the order of ranks, and goes on as
// any row operation. Two-shot: it sums a part of the columns, each rank another one, over the part of its own slot that
// only it reads; a second exchange; then rows are read once, each column from the rank that summed it. The sum is
// rounded to S in either case, so the bits are the same.
#pragma once

#include "exchange.cuh"
#include "pipeline.cuh"

namespace fused_ops {

HOST_DEVICE constexpr long long row_bytes(const Stages& k) {
  return (k.cols * (k.dtype == kFp32 ? 4ll : 2ll) + 15) / 16 * 16;
}

template <RankStages C>
struct Exchanged {
  static constexpr Stages K = C.row;
  using T = typename Held<K>::T;
  static constexpr int kPack = Held<K>::kPack;
  static constexpr long long kRowBytes = row_bytes(K);
  // Columns that a rank sums for all.
  static constexpr int kShare = ((K.cols + kPack - 1) / kPack + C.ranks - 1) / C.ranks * kPack;
  using Part = Pack<T, kPack>;

  const Ranks& ranks;
  long long slot;  // bytes from a workspace's beginning

  DEVICE T* row(int rank, long long place) const { return (T*)(ranks.memory[rank] + slot + place * kRowBytes); }

  // Elements [column, column + n) of a row of all ranks, summed. Four ranks' are on their way at once.
  DEVICE void sum(long long place, int column, int n, float (&total)[kPack]) const {
#pragma unroll
    for (int first = 0; first < C.ranks; first += 4) {
      Part parts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < C.ranks) fused_ops::load<K.aligned>(parts[i], (const T*)row(first + i, place) + column, n);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + i < C.ranks)
#pragma unroll
          for (int j = 0; j < kPack; j += 2) {
            float a, b;
            widen_two(parts[i].e + j, a, b);
            total[j] = first + i ? total[j] + a : a;
            total[j + 1] = first + i ? total[j + 1] + b : b;
          }
    }
  }

  // This rank's row to its slot; scattered: its rows of this number for every rank.
  DEVICE void publish(const Row& p, long long r) const {
    const auto copy = [&](long long from, long long place) {
      empty_row<K>().template write<Held<K>::kCols>([&](Held<K>& part) {
        load_rows(p.x, from, part);
        store_row(row(ranks.rank, place), part);
      });
    };
    const long long place = r - ranks.begin;
    if constexpr (C.scattered) {
      for (int to = 0; to < C.ranks; ++to) {
        const long long at = to * ranks.share + r;
        if (r < ranks.end && at < ranks.all) copy(at, to * (ranks.end - ranks.begin) + place);
      }
    } else if (r < ranks.end) {
      copy(r, place);
    }
  }

  DEVICE void load_sum(long long place, Held<K>& held) const {
#pragma unroll
    for (int i = 0; i < Held<K>::kPacks; ++i) {
      float total[kPack];
      sum(place, held.at(i), held.count(i), total);
      held.keep(i, total);
    }
  }

  // This rank's columns, over what only this rank reads of its slot.
  DEVICE void sum_share(long long place) const {
    const int first = ranks.rank * kShare, last = first + kShare < K.cols ? first + kShare : K.cols;
    for (int column = first + (int)(threadIdx.x % K.threads) * kPack; column < last; column += K.threads * kPack) {
      const int n = last - column < kPack ? last - column : kPack;
      float total[kPack];
      sum(place, column, n, total);
      Part part;
#pragma unroll
      for (int j = 0; j < kPack; j += 2) narrow_two(total[j], total[j + 1], part.e + j);
      store<K.aligned>(row(ranks.rank, place) + column, part, n);
    }
  }

  DEVICE void load_shares(long long place, Held<K>& held) const {
#pragma unroll
    for (int i = 0; i < Held<K>::kPacks; ++i) {
      const int n = held.count(i);
      fused_ops::load<K.aligned>(held.packs[i], (const T*)row(n ? held.at(i) / kShare : 0, place) + held.at(i), n);
    }
  }
};

DEVICE long long larger_of(long long a, long long b) { return a > b ? a : b; }

template <Stages K>
DEVICE void poison(Held<K>& held) {
  held.each([](float, int, int) { return bits<float>(kMagnitudeBits); });
}

// f(row), for this block's part of the rows before `end`: as many times for every thread.
template <Stages K, class F>
DEVICE void each_row(const Ranks& ranks, long long end, const F& f) {
  constexpr int kRows = Shared<K>::kRows;
  for (long long first = ranks.begin + (long long)blockIdx.x * kRows; first < end; first += ranks.blocks * kRows)
    f(first + threadIdx.x / K.threads);
}

template <RankStages C>
DEVICE void run(const Row& p, const Ranks& ranks, Shared<C.row>& shared) {
  constexpr Stages K = C.row;
  unsigned number;
  bool came = begin_call<C.ranks>(ranks, number);
  const Exchanged<C> all{ranks, slot_of(ranks, number)};
  if (came) {
    each_row<K>(ranks, ranks.end, [&](long long r) { all.publish(p, r); });
    came = exchange<C.ranks>(ranks, number, 0);
  }
  if constexpr (C.two_shot)
    if (came) {
      each_row<K>(ranks, ranks.end, [&](long long r) {
        if (r < ranks.end) all.sum_share(r - ranks.begin);
      });
      came = exchange<C.ranks>(ranks, number, 1);
    }
  const long long own = C.scattered ? ranks.rank * (ranks.end - ranks.begin) : 0;
  // Rows behind the last complete a layout of scales; a scale that is the tensor's is there without any.
  long long last = ranks.end > ranks.begin ? ranks.end : ranks.begin + 1;
  if (Codes<K>::kSwizzled && ranks.end >= p.rows) last = larger_of(last, (p.rows + 127) / 128 * 128);
  each_row<K>(ranks, last, [&](long long r) {
    const auto load = [&](Held<K>& held) {
      const long long place = own + r - ranks.begin;
      if (!came) {
        poison(held);
      } else if constexpr (C.two_shot) {
        all.load_shares(place, held);
      } else {
        all.load_sum(place, held);
      }
    };
    work(p, r, r < p.rows && r < ranks.end, load, shared);
    __syncthreads();  // before the next row's words are written where this one's are read
  });
}

// --- rows whose columns the ranks share: only sums of squares cross, those of q and k next to each other ---

template <int RANKS>
struct Squares {
  const Ranks& ranks;
  long long slot;

  DEVICE float* of(int rank, long long r) const { return (float*)(ranks.memory[rank] + slot) + 2 * (r - ranks.begin); }

  template <Stages K>
  DEVICE void publish(const Row& p, int which, Scratch& scratch) const {
    each_row<K>(ranks, ranks.end, [&](long long r) {
      auto row = empty_row<K>();
      auto&& loaded = row.then([&](Held<K>& part) {
        if (r < ranks.end) load_rows(p.x, r, part);
      });
      const float sum = sum_of<K, kNormSum>(loaded, scratch, [](float x, bool) { return x * x; });
      if (r < ranks.end && row.thread == 0) of(ranks.rank, r)[which] = sum;
      __syncthreads();
    });
  }

  template <Stages K>
  DEVICE void finish(const Row& p, int which, bool came) const {
    each_row<K>(ranks, ranks.end, [&](long long r) {
      if (r >= ranks.end) return;
      auto row = empty_row<K>();
      auto&& loaded = row.then([&](Held<K>& part) { load_rows(p.x, r, part); });
      const auto w = columns_of<K, K.norm.weight>(loaded, p.weight);
      float sum = of(0, r)[which];
#pragma unroll
      for (int rank = 1; rank < RANKS; ++rank) sum += of(rank, r)[which];
      if (!came) sum = bits<float>(kMagnitudeBits);
      const float rstd = 1.0f / sqrtf(sum / ((float)K.cols * RANKS) + p.eps);
      loaded.template write<Held<K>::kCols>([&](Held<K>& part) {
        scale_by<K, K.norm>(part, rstd, w(part));
        if constexpr (K.y) store_rows(p.y, r, part, K.y_cols);
      });
    });
  }
};

template <PairStages C>
DEVICE void run(const Row& q, const Row& k, const Ranks& ranks, Scratch& scratch) {
  unsigned number;
  bool came = begin_call<C.ranks>(ranks, number);
  const Squares<C.ranks> squares{ranks, slot_of(ranks, number)};
  if (came) {
    squares.template publish<C.q>(q, 0, scratch);
    squares.template publish<C.k>(k, 1, scratch);
    came = exchange<C.ranks>(ranks, number, 0);
  }
  squares.template finish<C.q>(q, 0, came);
  squares.template finish<C.k>(k, 1, came);
}

}  // namespace fused_ops

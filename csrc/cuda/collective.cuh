// Rows that are summed over ranks: a load stage, before any of the others.
//
// A workspace is a rank's Mailbox and two slots. In every call
//   1. a block copies its rows to its rank's slot,
//   2. raises a flag for the same block of every rank, and waits for theirs,
//   3. reads its rows from all slots, sums them in the order of ranks, and goes on as any row operation.
// Flags hold the number of the call, so nothing is ever reset, and a captured graph counts on. Calls use the slots in
// turns: a rank that writes a slot again has seen every rank begin the call in between, and so end the one that read it.
//
// Two-shot: after 2 a block sums a part of the columns, each rank another one, over the part of its own slot that only
// it reads; a second exchange; then rows are read once, each column from the rank that summed it. The sum is rounded to
// S in either case, so the bits are the same.
#pragma once

#include "pipeline.cuh"

namespace fused_ops {

constexpr long long row_bytes(const Stages& k) { return (k.cols * (k.dtype == kFp32 ? 4ll : 2ll) + 15) / 16 * 16; }

DEVICE Mailbox& mailbox(const Ranks& ranks, int rank) { return *(Mailbox*)ranks.memory[rank]; }

// Tells the host, once, and every rank that this one's workspace is of no use any more.
DEVICE void give_up(const Ranks& ranks, int count, Reason reason, int rank, unsigned number) {
  Mailbox& mine = mailbox(ranks, ranks.rank);
  if (atomicCAS(&mine.failed, 0u, 1u) != 0) return;
  ranks.failure->rank = rank;
  ranks.failure->call = ranks.call;
  if (reason == kOtherCall) ranks.failure->theirs = mailbox(ranks, rank).call[number % 2];
  raise_flag(&ranks.failure->reason, reason);
  for (int peer = 0; peer < count; ++peer) *(volatile unsigned*)&mailbox(ranks, peer).broken = 1 + ranks.rank;
}

// This call's number, and whether the workspace is still of use; nothing is written where it isn't, since another rank
// may not have waited for what is read. The last block to ask counts the call.
template <int RANKS>
DEVICE bool begin_call(const Ranks& ranks, unsigned& number) {
  Mailbox& mine = mailbox(ranks, ranks.rank);
  number = *(volatile unsigned*)&mine.calls + 1;
  const unsigned broken = *(volatile unsigned*)&mine.broken;
  const bool usable = __syncthreads_and(!broken);
  if (threadIdx.x == 0) {
    if (broken) give_up(ranks, RANKS, kGivenUp, (int)broken - 1, number);
    if (usable) mine.call[number % 2] = ranks.call;
    if (atomicInc(&mine.arrived, ranks.blocks - 1) == ranks.blocks - 1) mine.calls = number;
  }
  return usable;
}

// Waits for block blockIdx.x of every rank, which then sees what this one wrote. False for all threads where that
// failed.
template <int RANKS>
DEVICE bool exchange(const Ranks& ranks, unsigned number, int step) {
  __syncthreads();
  bool came = true;
  if (threadIdx.x < RANKS) {
    const int peer = threadIdx.x;
    const auto flag = [&](int at, int from) { return &mailbox(ranks, at).flags[number % 2][step][blockIdx.x][from]; };
    const unsigned long long expected = (unsigned long long)number << 32 | ranks.called;
    raise_flag(flag(peer, ranks.rank), expected);
    const volatile unsigned* const broken = &mailbox(ranks, ranks.rank).broken;
    const unsigned long long begin = nanoseconds();
    unsigned long long found;
    unsigned gone = 0;
    while ((found = look_at(flag(ranks.rank, peer))) != expected) {
      Reason reason = kNoFailure;
      if (found >> 32 == number) reason = kOtherCall;
      else if ((gone = *broken)) reason = kGivenUp;
      else if (nanoseconds() - begin > ranks.limit) reason = kTimedOut;
      if (reason != kNoFailure) {
        give_up(ranks, RANKS, reason, gone ? (int)gone - 1 : peer, number);
        came = false;
        break;
      }
      __nanosleep(32);
    }
  }
  return __syncthreads_and(came);
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
    Held<K> held = {};
    held.thread = threadIdx.x % K.threads;
    const long long place = r - ranks.begin;
    if constexpr (C.scattered) {
      for (int to = 0; to < C.ranks; ++to) {
        const long long at = to * ranks.share + r;
        if (r >= ranks.end || at >= ranks.all) continue;
        load_rows(p.x, at, held);
        store_row(row(ranks.rank, to * (ranks.end - ranks.begin) + place), held);
      }
    } else if (r < ranks.end) {
      load_rows(p.x, r, held);
      store_row(row(ranks.rank, place), held);
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
  const Exchanged<C> all{ranks, (long long)sizeof(Mailbox) + number % 2 * ranks.slot_bytes};
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

  DEVICE float* of(int rank, long long r) const {
    return (float*)(ranks.memory[rank] + slot) + 2 * (r - ranks.begin);
  }

  template <Stages K>
  DEVICE void publish(const Row& p, int which, Scratch& scratch) const {
    each_row<K>(ranks, ranks.end, [&](long long r) {
      Held<K> held = {};
      held.thread = threadIdx.x % K.threads;
      if (r < ranks.end) load_rows(p.x, r, held);
      const float sum = sum_of<K, kNormSum>(held, scratch, [](float x, int, int) { return x * x; });
      if (r < ranks.end && held.thread == 0) of(ranks.rank, r)[which] = sum;
      __syncthreads();
    });
  }

  template <Stages K>
  DEVICE void finish(const Row& p, int which, bool came) const {
    each_row<K>(ranks, ranks.end, [&](long long r) {
      if (r >= ranks.end) return;
      Held<K> held = {};
      held.thread = threadIdx.x % K.threads;
      load_rows(p.x, r, held);
      const Columns<K, K.norm.weight> w(held, p.weight);
      float sum = of(0, r)[which];
#pragma unroll
      for (int rank = 1; rank < RANKS; ++rank) sum += of(rank, r)[which];
      if (!came) sum = bits<float>(kMagnitudeBits);
      scale_by<K, K.norm>(held, 1.0f / sqrtf(sum / ((float)K.cols * RANKS) + p.eps), w);
      if constexpr (K.y) store_rows(p.y, r, held, K.y_cols);
    });
  }
};

template <PairStages C>
DEVICE void run(const Row& q, const Row& k, const Ranks& ranks, Scratch& scratch) {
  unsigned number;
  bool came = begin_call<C.ranks>(ranks, number);
  const Squares<C.ranks> squares{ranks, (long long)sizeof(Mailbox) + number % 2 * ranks.slot_bytes};
  if (came) {
    squares.template publish<C.q>(q, 0, scratch);
    squares.template publish<C.k>(k, 1, scratch);
    came = exchange<C.ranks>(ranks, number, 0);
  }
  squares.template finish<C.q>(q, 0, came);
  squares.template finish<C.k>(k, 1, came);
}

}  // namespace fused_ops

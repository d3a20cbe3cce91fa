// Norm, rotation and cache writes of heads: the stages of rows, and those that ask for a token's position or slot.
//
// A head is a row like any other, spread over threads as its length says, so that its norm is that of rows. Kinds of
// heads (q, k, v, the gate) have blocks of their own; a block's heads are neighbours, of one token or a few, so that
// cosines and sines come from the L1 cache after the first.
#pragma once

#include "pipeline.cuh"

namespace fused_ops {

// Heads in terms of rows.
template <TokenStages K, HeadStages H, bool ANY = (H.threads > 0)>
struct Side {
  struct Shared {};
};

template <TokenStages K, HeadStages H>
struct Side<K, H, true> {
  static HOST_DEVICE constexpr Stages rows(int cols, int threads, long long key) {
    Stages s = {};
    s.dtype = K.dtype;
    s.cols = cols;
    s.threads = threads;
    s.block = K.block;
    s.aligned = H.aligned;
    s.norm = H.norm;
    s.data = H.data;
    s.scale = H.scale;
    s.flat = H.flat;
    s.key = key;
    return s;
  }
  static constexpr Stages kHead = rows(H.cols, H.threads, H.key);
  static constexpr Stages kInCache = rows(H.cols, H.threads, H.cache_key);
  static constexpr Stages kWhole = rows(H.whole_cols, H.whole_threads, 0);

  using Held = fused_ops::Held<kHead>;
  using T = typename Held::T;

  // How an element meets the other one of its pair. Interleaved, they are neighbours in a pack. Halves of a head that
  // are whole steps of its threads are in one thread. Others are read from shared memory, where the head is put as it
  // lies: any distance will do there, and no output is written before every input is read, be they the same.
  static constexpr int kStep = Held::kPack * H.threads;
  static constexpr int kPairs = K.neox ? Held::kPack : Held::kPack / 2;  // in a pack
  static constexpr int kAway = K.half / kStep;  // packs between the halves of a pair that are kOwn
  static constexpr bool kOwn = K.neox && K.half % kStep == 0, kShares = H.rotated && K.neox && !kOwn;
  static constexpr bool kWholePacks = K.half % kPairs == 0;  // a pack turns as one or not at all
  static constexpr int kHeads = K.block / H.threads, kShared = Held::kPacks * kStep;

  // Which pair element e is of.
  static DEVICE int pair(int e) { return !K.neox ? e / 2 : e < K.half ? e : e - K.half; }

  // Whether the next head has to wait for what this one shares besides.
  static constexpr bool kBarriers = H.threads > kWarp || fused_ops::Shared<kHead>::kGroups;

  struct Shared {
    fused_ops::Shared<kHead> rows;
    alignas(16) T heads[kShares ? kHeads * kShared : 1];
  };
};

DEVICE long long index_at(const void* indices, bool are_long, long long i) {
  return are_long ? ((const long long*)indices)[i] : ((const int*)indices)[i];
}

// --- a token's place ---

// Its rows of the table, one for each axis, and its slot, -1 where nothing is to be written, with the bytes to there.
template <TokenStages K>
struct Token {
  static constexpr int kAxes = K.mrope ? 3 : 1;
  const float* rows[kAxes];
  long long slot = -1, in_cache = 0;
  bool inside = true;  // position and slot

  DEVICE Token(const Tokens& p, long long t, const CachePlace& cache) {
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) {
      long long row = t;
      if constexpr (K.positions) {
        row = index_at(p.positions, p.long_positions, axis * p.axis_stride + t);
        const bool found = row >= 0 && row < p.table_rows;
        inside = inside && found;
        row = found ? row : 0;
      }
      rows[axis] = (const float*)(p.table + row * p.table_stride);
    }
    if constexpr (!K.slots) return;
    if (t < p.slot_count) slot = index_at(p.slots, p.long_slots, t);
    inside = inside && slot >= -1 && slot < p.slots_in_cache;
    if (!inside) slot = -1;
    if (slot >= 0) in_cache = slot / p.block_size * cache.block + slot % p.block_size * cache.slot;
  }
};

// Which position pair i turns by: as Rope::axis in csrc/rope.h.
template <int MROPE>
DEVICE int axis_of(int i) {
  constexpr int time = MROPE & 1023, height = MROPE >> 10 & 1023, width = MROPE >> 20 & 1023;
  if constexpr (MROPE >> 30) return i % 3 == 1 && i < 3 * height ? 1 : i % 3 == 2 && i < 3 * width ? 2 : 0;
  return i < time ? 0 : i < time + height ? 1 : 2;
}

// --- rotation ---

// Cosines and sines that a thread's packs turn by: the same for every head of a token.
template <TokenStages K, HeadStages H>
struct Turn {
  using S = Side<K, H>;
  using T = typename S::T;
  static constexpr int kPack = S::Held::kPack, kPairs = S::kPairs;
  static constexpr int kTurns = S::kOwn && K.half ? S::kAway : S::Held::kPacks;  // of pack i: i % kTurns
  float cos[kTurns][kPairs], sin[kTurns][kPairs];

  DEVICE Turn(const Token<K>& token, int thread) {
    typename S::Held held;
    held.thread = thread;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int c = held.at(i);
      if constexpr (S::kWholePacks && K.aligned_table) {
        if (c < 2 * K.half) load_pairs<true, kPairs>(token, S::pair(c), cos[i], sin[i]);
      } else {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const int e = K.neox ? c + j : c + 2 * j;
          if (e < 2 * K.half) load_pairs<false, 1>(token, S::pair(e), &cos[i][j], &sin[i][j]);
        }
      }
    }
  }

  template <bool ALIGNED, int N>
  DEVICE void load_pairs(const Token<K>& token, int first, float* to_cos, float* to_sin) {
#pragma unroll
    for (int axis = 0; axis < Token<K>::kAxes; ++axis) {
      Pack<float, N> c, s;
      load<ALIGNED>(c, token.rows[axis] + first, N);
      load<ALIGNED>(s, token.rows[axis] + K.half + first, N);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (axis > 0 && axis_of<K.mrope>(first + j) != axis) continue;
        to_cos[j] = K.round_products ? round_to<T>(c.e[j]) : c.e[j];
        to_sin[j] = K.round_products ? round_to<T>(s.e[j]) : s.e[j];
      }
    }
  }
};

// The other elements of the pairs in pack i; `shared` is their head, where it had to be shared.
template <TokenStages K, HeadStages H>
DEVICE void others_of(const typename Side<K, H>::Held& held, int i, const typename Side<K, H>::T* shared,
                      float (&other)[Side<K, H>::Held::kPack]) {
  using S = Side<K, H>;
  constexpr int kPack = S::Held::kPack;
  const int c = held.at(i);
  if constexpr (!K.neox) {
    float x[kPack];
    held.floats(i, x);
#pragma unroll
    for (int j = 0; j < kPack; ++j) other[j] = x[j ^ 1];
  } else if constexpr (S::kOwn) {
    held.floats(i < S::kAway ? i + S::kAway : i - S::kAway, other);
  } else {
    Pack<typename S::T, kPack> pack;
    const auto away = [](int e) { return e < K.half ? e + K.half : e < 2 * K.half ? e - K.half : 0; };
    if constexpr (S::kWholePacks) {
      load<true>(pack, shared + away(c), kPack);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.e[j] = shared[away(c + j)];
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) other[j] = widen(pack.e[j]);
  }
}

template <Stages K>
DEVICE void meet() {
  K.threads > kWarp ? __syncthreads() : __syncwarp();
}

// y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin.
template <TokenStages K, HeadStages H>
DEVICE void rotate(typename Side<K, H>::Held& held, const Turn<K, H>& turn, typename Side<K, H>::T* shared) {
  using S = Side<K, H>;
  constexpr int kPack = S::Held::kPack, kPacks = S::Held::kPacks;
  if constexpr (S::kShares) {
    meet<S::kHead>();  // the head before has been read
#pragma unroll
    for (int i = 0; i < kPacks; ++i) store<true>(shared + held.at(i), held.packs[i], kPack);
    meet<S::kHead>();
  }
  const auto product = [](float a, float b) { return K.round_products ? round_to<typename S::T>(a * b) : a * b; };
  const typename S::Held before = held;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = held.at(i);
    if (c >= 2 * K.half) continue;
    float x[kPack], other[kPack];
    before.floats(i, x);
    others_of<K, H>(before, i, shared, other);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (!S::kWholePacks && c + j >= 2 * K.half) continue;
      const bool first = K.neox ? c + (S::kWholePacks ? 0 : j) < K.half : j % 2 == 0;
      const float cos = turn.cos[i % turn.kTurns][K.neox ? j : j / 2],
                  sin = turn.sin[i % turn.kTurns][K.neox ? j : j / 2];
      x[j] = product(x[j], cos) + product(other[j], first ? -sin : sin);
    }
    held.keep(i, x);
  }
}

// --- a head ---

template <Stages K>
DEVICE void sigmoid(Held<K>& held) {
  held.each([](float x, int, int) { return x == x ? 1.0f / one_plus_exp_minus<typename Held<K>::T>(x) : x; });
}

template <TokenStages K, HeadStages H>
DEVICE void write_cache(const typename Side<K, H>::Held& held, const CachePlace& cache, char* to, long long h) {
  if constexpr (!H.coded) {
    store_row((typename Side<K, H>::T*)to, held);
  } else {
    constexpr Stages kCodes = Side<K, H>::kInCache;
    const float reciprocal = 1.0f / cache.scale[h * cache.scale_step];
    const auto codes = bits<Held<kCodes>>(held);
#pragma unroll
    for (int i = 0; i < Held<kCodes>::kPacks; ++i) store_codes(codes, i, (unsigned char*)to, reciprocal, 0);
  }
}

template <TokenStages K, HeadStages H>
DEVICE void write_codes(typename Side<K, H>::Held& held, const Row& p, long long r, bool active,
                        typename Side<K, H>::Shared& shared) {
  constexpr Stages R = Side<K, H>::kHead;
  constexpr int kAmax = Shared<R>::kGroups ? Shared<R>::kParts * Codes<R>::kTogether : 0;
  quantize<R>(p, r, held, shared.rows.scratch, shared.rows.amax + threadIdx.x / H.threads * kAmax, active);
  if constexpr (Codes<R>::kSwizzled)
    if (r >= p.rows && r < (p.rows + 127) / 128 * 128) zero_padding<R>(p, r, held.thread);
}

// Some heads of a token: `first`, and more in steps. All are on their way before the first is worked on. Threads
// without a head of their own go along with one that is there, since barriers count them, and write nothing.
template <TokenStages K, HeadStages H>
struct Some {
  using S = Side<K, H>;
  using T = typename S::T;
  static constexpr Stages kHead = S::kHead;
  const Heads& heads;
  long long t;
  int first, step;
  bool there;  // the token
  typename S::Held held[H.together];

  DEVICE int head(int n) const { return first + n * step; }
  DEVICE bool active(int n) const { return there && head(n) < heads.count; }

  DEVICE Some(const Heads& of, long long token, int begin, int apart, bool is_there)
      : heads(of), t(token), first(begin), step(apart), there(is_there) {
    const char* const from = heads.in.data + (there ? t : 0) * heads.in.token;
#pragma unroll
    for (int n = 0; n < H.together; ++n) {
      held[n].thread = threadIdx.x % H.threads;
      load_row((const T*)(from + (head(n) < heads.count ? head(n) : 0) * heads.in.head), held[n]);
    }
  }

  // rstd: of all heads of the token, where a norm is of them.
  DEVICE void norm(float rstd, Scratch& scratch) {
    using Weight = Columns<kHead, H.norm.weight>;
    using W = typename Element<H.norm.weight>::type;
    if constexpr (H.norm.kind == kNoNorm) return;
    const Weight of_each(held[0], heads.weight);
#pragma unroll
    for (int n = 0; n < H.together; ++n) {
      if constexpr (H.whole_cols > 0) {
        const int h = head(n) < heads.count ? head(n) : 0;
        scale_by<kHead, H.norm>(held[n], rstd, Weight(held[n], (const W*)heads.weight + (long long)h * H.cols));
      } else {
        scale_by<kHead, H.norm>(held[n], rstd_of<kHead, kNormSum>(held[n], heads.eps, scratch), of_each);
        if constexpr (S::kBarriers) __syncthreads();  // before the next sum is shared
      }
    }
  }

  DEVICE void run(const Tokens& p, const Token<K>& token, const Turn<K, H>& turn, typename S::Shared& shared) {
    char *const out = heads.out.data + t * heads.out.token, *const cache = heads.cache.data + token.in_cache;
#pragma unroll
    for (int n = 0; n < H.together; ++n) {
      const long long h = head(n);
      if constexpr (H.sigmoid) sigmoid(held[n]);
      if constexpr (H.rotated) {
        rotate<K, H>(held[n], turn, shared.heads + (S::kShares ? threadIdx.x / H.threads * S::kShared : 0));
        if (!token.inside) held[n].each([](float, int, int) { return bits<float>(kNanBits); });
      }
      if constexpr (H.y)
        if (active(n)) store_row((T*)(out + h * heads.out.head), held[n]);
      if constexpr (H.cached)
        if (active(n) && token.slot >= 0) write_cache<K, H>(held[n], heads.cache, cache + h * heads.cache.head, h);
      if constexpr (H.data || H.scale) {
        write_codes<K, H>(held[n], p.codes, t * heads.count + h, active(n), shared);
        if constexpr (S::kBarriers) __syncthreads();  // before the next one's maxima are shared
      }
    }
  }
};

// --- heads of tokens ---

// The norm's factor of all heads of token t, which need not lie side by side.
template <TokenStages K, HeadStages H>
DEVICE float rstd_of_all(const Heads& heads, long long t, bool active, Scratch& scratch) {
  constexpr Stages W = Side<K, H>::kWhole;
  using Part = Held<W>;
  using T = typename Part::T;
  const char* const from = heads.in.data + t * heads.in.token;
  const auto element = [&](int c) { return (const T*)(from + c / H.cols * heads.in.head) + c % H.cols; };
  auto row = empty_row<W>();
  auto&& all = row.then([&](Part& held) {
    if (!active) return;
#pragma unroll
    for (int i = 0; i < Part::kPacks; ++i) {
      const int c = held.at(i), n = held.count(i);
      if constexpr (H.aligned) {
        load<true>(held.packs[i], element(c), n);
      } else {
#pragma unroll
        for (int j = 0; j < Part::kPack; ++j) held.packs[i].e[j] = j < n ? *element(c + j) : T{};
      }
    }
  });
  return rstd_of<W, kPostSum>(all, heads.eps, scratch);
}

// Blocks of a few heads for so many threads.
template <TokenStages K, HeadStages H>
DEVICE void run_each(const Tokens& p, const Heads& heads, unsigned block, typename Side<K, H>::Shared& shared) {
  constexpr unsigned kUnits = K.block / H.threads;
  // Of a token; as many blocks as that is hold whole tokens, so that no 64-bit number has to be divided.
  const unsigned units = (heads.count + H.together - 1) / H.together;
  const unsigned unit = block % units * kUnits + threadIdx.x / H.threads;
  const long long t = (long long)(block / units) * kUnits + unit / units;
  const bool there = t < p.tokens;
  Some<K, H> some(heads, t, unit % units * H.together, 1, there);
  __syncwarp();  // or compilers wait for the position before the heads are on their way
  const Token<K> token(p, there ? t : 0, heads.cache);
  const Turn<K, H> turn(token, threadIdx.x % H.threads);
  some.norm(0, shared.rows.scratch);
  some.run(p, token, turn, shared);
}

// Blocks of tokens, whose threads sum all heads, then take them in turns.
template <TokenStages K, HeadStages H>
DEVICE void run_whole(const Tokens& p, const Heads& heads, unsigned block, typename Side<K, H>::Shared& shared) {
  constexpr int kTokens = K.block / H.whole_threads, kStep = H.whole_threads / H.threads;
  const long long t = (long long)block * kTokens + threadIdx.x / H.whole_threads;
  const bool there = t < p.tokens;
  const float rstd = rstd_of_all<K, H>(heads, t, there, shared.rows.scratch);
  const Token<K> token(p, there ? t : 0, heads.cache);
  const Turn<K, H> turn(token, threadIdx.x % H.threads);
  for (int h = 0; h < heads.count; h += kStep * H.together) {
    Some<K, H> some(heads, t, h + threadIdx.x % H.whole_threads / H.threads, kStep, there);
    some.norm(rstd, shared.rows.scratch);
    some.run(p, token, turn, shared);
  }
}

template <TokenStages K, HeadStages H>
DEVICE void run_heads(const Tokens& p, const Heads& heads, unsigned block, typename Side<K, H>::Shared& shared) {
  if constexpr (H.whole_cols > 0) {
    run_whole<K, H>(p, heads, block, shared);
  } else if constexpr (H.threads > 0) {
    run_each<K, H>(p, heads, block, shared);
  }
}

template <TokenStages K>
union SharedByHeads {
  typename Side<K, K.q>::Shared q;
  typename Side<K, K.k>::Shared k;
  typename Side<K, K.v>::Shared v;
  typename Side<K, K.gate>::Shared gate;
};

template <TokenStages K>
DEVICE void run(const Tokens& p, unsigned block, SharedByHeads<K>& shared) {
  if (block < p.q.blocks) return run_heads<K, K.q>(p, p.q, block, shared.q);
  block -= p.q.blocks;
  if (block < p.k.blocks) return run_heads<K, K.k>(p, p.k, block, shared.k);
  block -= p.k.blocks;
  if (block < p.v.blocks) return run_heads<K, K.v>(p, p.v, block, shared.v);
  block -= p.v.blocks;
  run_heads<K, K.gate>(p, p.gate, block, shared.gate);
}

}  // namespace fused_ops

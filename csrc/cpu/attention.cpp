#include "../attention.h"

#include <atomic>
#include <exception>
#include <memory>

#include "attention.h"
#include "threads.h"

#define KERNELS "mla.inc"
#include "each_isa.inc"

namespace fused_ops {

namespace {

// What a call holds at most of each, besides its results; docs/attention.md says so.
constexpr int64_t kPartFloats = 1 << 24;    // parts of blocks that are spread over threads
constexpr int64_t kLatentFloats = 1 << 22;  // queries that are projected at once, or one token's
constexpr int64_t kStateFloats = 1 << 24;   // states of queries for which keys and values are projected once,
constexpr int64_t kLeastExpanded = 1024;    // or of so many queries a thread: for fewer, projecting takes most

constexpr int64_t kLeastGroups = 4;  // of tiles a thread, for none to wait for another one for long
constexpr double kMultiplied = 16;   // so many products are the unit of kSerial

struct alignas(64) Line {
  float v[16];
};

std::unique_ptr<Line[]> floats(int64_t count) { return std::unique_ptr<Line[]>(new Line[count / 16 + 1]); }

// fn(i, memory) for each i of `count` pieces of work, the next one for whoever is free; a thread has `size` floats.
// work: of all, in the unit of kSerial.
template <class Fn>
void for_each(int64_t count, int64_t size, double work, const Fn& fn) {
  if (!count) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;  // torch's threads would lose what it says
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  parallel_rows(workers, static_cast<int64_t>(std::min<double>(work, 1 << 30)) / workers, [&](int64_t, int64_t) {
    try {
      const auto memory = floats(size);
      for (int64_t i; (i = next++) < count;) fn(i, memory[0].v);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The later of a sequence's tokens, which see most, first.
std::vector<Tile> tiles_of(const Attention& p) {
  std::vector<Tile> tiles;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t heads = std::min<int64_t>(group, kTileRows), tokens = std::max<int64_t>(1, kTileRows / group);
  for (const Sequence& s : p.sequences)
    for (int64_t token = (s.queries - 1) / tokens * tokens; token >= 0; token -= tokens)
      for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
        for (int64_t head = 0; head < group; head += heads) {
          const int64_t count = std::min(tokens, s.queries - token);
          const int64_t first = p.seen(s, token).first / kKeys;
          const int64_t blocks = (p.seen(s, token + count - 1).second + kKeys - 1) / kKeys - first;
          tiles.push_back(
              {&s, kv_head, token, count, kv_head * group + head, std::min(heads, group - head), first, blocks});
        }
  return tiles;
}

// Those that are worked on together.
std::vector<Tiles> side_by_side(const std::vector<Tile>& tiles) {
  std::vector<Tiles> groups;
  int64_t rows = kSideBySide;
  const Tile* last = nullptr;
  for (const Tile& tile : tiles) {
    const int64_t more = round_up(tile.rows(), 4);
    const bool together = last && tile.sequence == last->sequence && tile.token == last->token;
    if (together && rows + more <= kSideBySide) {
      ++groups.back().count;
      rows += more;
    } else {
      groups.push_back({&tile, 1});
      rows = more;
    }
    last = &tile;
  }
  return groups;
}

// Blocks [first, first + count) of tiles.
struct Piece {
  Tiles tiles;
  int64_t first, count;
};

// Of a tile, in the unit of kSerial.
double work_of(const Attention& p, const Tile& tile) {
  const Sequence& s = *tile.sequence;
  const int64_t keys = p.seen(s, tile.token + tile.tokens - 1).second - p.seen(s, tile.token).first;
  return static_cast<double>(keys) * static_cast<double>(tile.rows() * (p.k.cols + p.v.cols)) / kMultiplied;
}

// Where there are too few groups of tiles for the threads, these share the blocks of a tile, and merge their parts
// afterwards.
void run_tiles(const Attention& p) {
  std::vector<Tile> tiles = tiles_of(p);
  const std::vector<Tiles> groups = side_by_side(tiles);
  const int64_t stride = round_up(p.v.cols, 16), count = static_cast<int64_t>(groups.size());
  int64_t blocks = 0, part = 0;
  double work = 0;
  for (const Tile& tile : tiles) {
    work += work_of(p, tile);
    part += tile.blocks * part_floats(tile, stride);
  }
  for (const Tiles& group : groups) blocks += group[0].blocks;

  const int64_t threads = torch::stable::get_num_threads();
  const bool spread =
      threads > 1 && count < kLeastGroups * threads && blocks > count && part <= kPartFloats && work >= kSerial;
  const auto parts = floats(spread ? part : 0);
  float* next = parts[0].v;
  if (spread)
    for (Tile& tile : tiles) {
      tile.parts = next;
      next += tile.blocks * part_floats(tile, stride);
    }
  const int64_t most = spread ? std::max<int64_t>(1, blocks / (kLeastGroups * threads)) : blocks;
  std::vector<Piece> pieces;
  for (const Tiles& group : groups) {
    const auto& [first, all] = std::pair(group[0].first, group[0].blocks);
    for (int64_t b = 0; b < all; b += most) pieces.push_back({group, first + b, std::min(most, all - b)});
  }

  const auto desk = [&](float* memory) { return Desk(memory, kSideBySide, p.k.cols, kKeys, p.v.cols); };
  const int64_t size = Desk::floats(kSideBySide, p.k.cols, kKeys, p.v.cols);
  for_each(static_cast<int64_t>(pieces.size()), size, work, [&](int64_t i, float* memory) {
    PICK_ISA(attend)(p, pieces[i].tiles, pieces[i].first, pieces[i].count, desk(memory));
  });
  if (!spread) return;
  for_each(static_cast<int64_t>(tiles.size()), size, static_cast<double>(part),
           [&](int64_t i, float* memory) { PICK_ISA(merge_parts)(p, tiles[i], desk(memory)); });
}

void put_unused(const Attention& p) {
  const int64_t cols = p.out.cols / p.heads, rows = p.out.rows - p.used;
  const double work = static_cast<double>(rows) * static_cast<double>(p.out.cols);
  for_each(rows, Desk::floats(1, cols, cols, cols), work, [&](int64_t i, float* memory) {
    PICK_ISA(put_zeros)(p, p.used + i, p.used + i + 1, Desk(memory, 1, cols, cols, cols));
  });
}

// fn(slice) for at most so many of a sequence's queries at a time, the last ones first. A slice is a sequence that ends
// with its last query, which sees nothing behind.
template <class Fn>
void for_slices(const Sequence& s, int64_t most, const Fn& fn) {
  for (int64_t first = (s.queries - 1) / most * most; first >= 0; first -= most) {
    const int64_t count = std::min(most, s.queries - first);
    fn(Sequence{s.index, s.row + first, count, s.length - s.queries + first + count});
  }
}

// Sequences whose queries are projected to the latents' space, attend to latents there, and are projected back.
void run_absorbed(const Mla& p, std::vector<Sequence> sequences) {
  Attention a = p.attention;
  std::vector<int64_t> rows;  // of q, of each row here
  for (Sequence& s : sequences) {
    const int64_t first = static_cast<int64_t>(rows.size());
    for (int64_t t = 0; t < s.queries; ++t) rows.push_back(s.row + t);
    s.row = first;
  }
  const int64_t count = static_cast<int64_t>(rows.size()), cols = a.k.cols, bytes = cols * sizeof(float);
  const auto memory = floats(count * a.heads * cols);
  a.sequences = std::move(sequences);
  a.q = a.results = {reinterpret_cast<char*>(memory[0].v), a.heads * bytes, bytes};
  a.q_dtype = ScalarType::Float;

  const int64_t tiles = (count + kStaged - 1) / kStaged;
  const int64_t x_cols = std::max(p.rank, p.w_uk.rows), vectors = std::max({p.w_uk.rows, p.w_uv.rows, p.rope});
  const auto for_projections = [&](const auto& project, const Place& place) {
    const double work = static_cast<double>(count * a.heads * p.rank) * vectors / kMultiplied;
    for_each(tiles * a.heads, Desk::floats(kStaged, x_cols, vectors, p.rank), work, [&](int64_t i, float* buffer) {
      const int64_t first = i % tiles * kStaged;
      const int at_once = static_cast<int>(std::min<int64_t>(kStaged, count - first));
      project(p, rows.data() + first, first, at_once, i / tiles, place, Desk(buffer, kStaged, x_cols, vectors, p.rank));
    });
  };
  for_projections(PICK_ISA(project_queries), a.q);
  run_tiles(a);
  for_projections(PICK_ISA(project_results), a.results);
}

// Sequences whose keys and values are projected from the latents, for one head after another.
void run_expanded(const Mla& p, const std::vector<Sequence>& sequences) {
  const int64_t k_cols = p.w_uk.rows + p.rope, v_cols = p.w_uv.rows, heads = p.attention.heads;
  const int64_t vectors = std::max<int64_t>({p.w_uk.rows, v_cols, p.rope, kStaged});
  int64_t most = 0;
  double work = 0;
  for (const Sequence& s : sequences) {
    most = std::max(most, round_up(s.queries, kTileRows));
    work += static_cast<double>(s.length) * static_cast<double>(heads * (k_cols + v_cols) * p.rank) / kMultiplied;
  }

  const auto lay_out = [&](float* memory, int64_t& used) {
    const auto matrix = [&](int64_t rows, int64_t cols) {
      const Matrix m{memory + used, round_up(cols, 16)};
      used += round_up(rows * m.stride + kLanes, 16);
      return m;
    };
    Expansion e{matrix(kKeys + 4, k_cols + kDotsAtOnce),
                matrix(kKeys + 4, v_cols + kDotsAtOnce),
                matrix(most, v_cols),
                matrix(1, most).data,
                matrix(1, most).data,
                Desk(memory + used, kStaged, p.rank, vectors, p.rank),
                Desk(nullptr, 1, 1, 1, 1)};
    used += Desk::floats(kStaged, p.rank, vectors, p.rank);
    e.attention = Desk(memory + used, kTileRows, k_cols, kKeys, v_cols);
    used += Desk::floats(kTileRows, k_cols, kKeys, v_cols);
    return e;
  };
  int64_t size = 0;
  lay_out(nullptr, size);
  for_each(static_cast<int64_t>(sequences.size()) * heads, size, work, [&](int64_t i, float* memory) {
    int64_t used = 0;
    PICK_ISA(attend_expanded)(p, sequences[i / heads], i % heads, lay_out(memory, used));
  });
}

}  // namespace

void run_on_cpu(Attention& p) {
  prepare_on_cpu(p.out);
  run_tiles(p);
  put_unused(p);
}

void run_on_cpu(Mla& p) {
  const Attention& a = p.attention;
  prepare_on_cpu(p.attention.out);
  std::vector<Sequence> absorbed, expanded;
  int64_t queries = 0;
  const int64_t at_once = std::max<int64_t>(1, kLatentFloats / (a.heads * a.k.cols));
  const int64_t states = kStateFloats / (torch::stable::get_num_threads() * p.w_uv.rows);
  for (const Sequence& s : a.sequences) {
    if (!p.absorbs(s)) {
      for_slices(s, std::max(kLeastExpanded, states), [&](const Sequence& slice) { expanded.push_back(slice); });
      continue;
    }
    for_slices(s, at_once, [&](const Sequence& slice) {
      if (queries + slice.queries > at_once) {
        run_absorbed(p, std::move(absorbed));
        absorbed.clear();
        queries = 0;
      }
      absorbed.push_back(slice);
      queries += slice.queries;
    });
  }
  if (!absorbed.empty()) run_absorbed(p, std::move(absorbed));
  if (!expanded.empty()) run_expanded(p, expanded);
  put_unused(a);
}

}  // namespace fused_ops

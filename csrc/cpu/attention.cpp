#include "../attention.h"

#include <atomic>
#include <functional>
#include <memory>

#include "attention.h"
#include "threads.h"

#define KERNELS "attention.inc"
#include "each_isa.inc"

namespace fused_ops {

namespace {

constexpr int64_t kRows = 64;             // of a tile, if it has more than a token
constexpr int64_t kPartFloats = 1 << 24;  // of blocks that are spread over threads

struct alignas(64) Line {
  float v[16];
};

// fn(i, desk) for each i of `count` pieces of work, the next one for whoever is free.
template <class Fn>
void for_each(int64_t count, int64_t floats, const std::function<Desk(float*)>& desk_in, const Fn& fn) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  constexpr int64_t kWorthAThread = 1 << 20;
  parallel_rows(threads, kWorthAThread, [&](int64_t, int64_t) {
    const std::unique_ptr<Line[]> memory(new Line[(floats + 15) / 16]);
    const Desk desk = desk_in(memory[0].v);
    for (int64_t i; (i = next++) < count;) fn(i, desk);
  });
}

// The later of a sequence's tokens, which see most, first.
std::vector<Tile> tiles_of(const Attention& p) {
  std::vector<Tile> tiles;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t heads = std::min(group, kRows), tokens = std::max<int64_t>(1, kRows / group);
  for (const Sequence& s : p.sequences)
    for (int64_t token = (s.queries - 1) / tokens * tokens; token >= 0; token -= tokens)
      for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head)
        for (int64_t head = 0; head < group; head += heads) {
          Tile tile{&s, kv_head, token, std::min(tokens, s.queries - token), kv_head * group + head,
                    std::min(heads, group - head), 0, 0};
          tile.first = p.seen(s, token).first / kKeys;
          tile.blocks = (p.seen(s, token + tile.tokens - 1).second + kKeys - 1) / kKeys - tile.first;
          tiles.push_back(tile);
        }
  return tiles;
}

struct Piece {
  const Tile* tile;
  int64_t first, count;
};

}  // namespace

void run_on_cpu(Attention& p) {
  if (p.out.data) prepare_on_cpu(p.out);
  std::vector<Tile> tiles = tiles_of(p);
  const auto attend = PICK_ISA(attend);
  const auto merge_parts = PICK_ISA(merge_parts);
  const auto put_zeros = PICK_ISA(put_zeros);

  int64_t rows = 1, blocks = 0, part = 0;
  for (const Tile& tile : tiles) {
    rows = std::max<int64_t>(rows, tile.rows());
    blocks += tile.blocks;
    part += tile.blocks * part_floats(tile, round_up(p.v.cols, 8));
  }
  const auto desk_in = [&](float* memory) { return Desk(memory, rows, p.k.cols, kKeys, p.v.cols); };
  const int64_t floats = Desk::floats(rows, p.k.cols, kKeys, p.v.cols);

  const int64_t count = static_cast<int64_t>(tiles.size()), threads = torch::stable::get_num_threads();
  std::unique_ptr<Line[]> parts;
  std::vector<Piece> pieces;
  if (count < threads && blocks > count && part <= kPartFloats) {
    parts.reset(new Line[part / 16 + 1]);
    float* next = parts[0].v;
    const int64_t at_once = std::max<int64_t>(1, blocks / (2 * threads));
    for (Tile& tile : tiles) {
      tile.parts = next;
      next += tile.blocks * part_floats(tile, round_up(p.v.cols, 8));
      for (int64_t b = 0; b < tile.blocks; b += at_once)
        pieces.push_back({&tile, tile.first + b, std::min(at_once, tile.blocks - b)});
    }
  } else {
    for (const Tile& tile : tiles) pieces.push_back({&tile, tile.first, tile.blocks});
  }
  for_each(static_cast<int64_t>(pieces.size()), floats, desk_in, [&](int64_t i, const Desk& desk) {
    attend(p, *pieces[i].tile, pieces[i].first, pieces[i].count, desk);
  });
  if (parts) for_each(count, floats, desk_in, [&](int64_t i, const Desk& desk) { merge_parts(p, tiles[i], desk); });
  if (p.used < p.out.rows && !p.results)
    for_each(1, floats, desk_in, [&](int64_t, const Desk& desk) { put_zeros(p, p.used, p.out.rows, desk); });
}

}  // namespace fused_ops

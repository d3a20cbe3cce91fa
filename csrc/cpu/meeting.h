// What the ranks of a workspace share, and how they meet in it (fused_ops/_shared.py makes the memory).
//
//   header                 what the workspace is; 64 bytes, then 64 with `broken`
//   a Rank for each        how far it is, and what it calls
//   two slots for each     rows that it hands to the others
//
// Ranks meet in turns, numbered alike on all of them since they make the same calls: each writes its rows into its slot
// of the turn (turn % 2), publishes the turn, waits until all have, and reads all slots. Two slots make one wait a turn
// enough: who writes for turn n + 2 has seen all publish n + 1, which each did when it had read turn n. The same holds
// for what they call, so a rank compares before it writes any result; if two differ, every rank differs from one.
//
// Attempts are numbered too, also such as a rank refuses before it meets the others. Ranks that meet in an earlier one
// than another rank raise, since that one has refused it; who is ahead waits for them in the turn that follows. A call
// that another thread makes meanwhile is none of the rank's, and has no number.
#pragma once

#include <atomic>
#include <exception>
#include <memory>

#include "../collective.h"

namespace fused_ops {

struct Header {
  uint64_t magic;
  int64_t bytes, ranks, slot, timeout, two_shot_above, nonce;  // of the memory, of a slot; in ns
};

// Throws where this isn't the whole memory of a workspace: whatever else it says, the slots of its ranks lie in it.
Header header_of(const char* memory, int64_t bytes);

struct Rank {
  std::atomic<int64_t> turns;  // twice the turns published, and one more between the two halves of a two-shot one
  alignas(64) std::atomic<int64_t> calling;
  int64_t process, address;  // who may call
  std::atomic<int64_t> attempts;
  alignas(64) Call calls[2];
};
static_assert(sizeof(Rank) == 384 && std::atomic<int64_t>::is_always_lock_free);

// Begins a call of this rank, and numbers it; it ends with the last copy of what is returned. Throws where this isn't
// that rank's process, or it is in a call already.
std::shared_ptr<void> begin_call(const Collective& of);

// One rank's side of a call that has begun. Throws where a rank has given up waiting. No access leaves the memory,
// whatever lies in it.
class Meeting {
 public:
  Meeting(const Collective& of, const Call& call);
  ~Meeting();
  Meeting(const Meeting&) = delete;

  int64_t ranks() const { return header_.ranks; }
  int64_t rank() const { return rank_; }
  int64_t slot_bytes() const { return header_.slot; }
  int64_t two_shot_above() const { return header_.two_shot_above; }

  // Of this turn; slots of ranks lie rank_bytes apart, from that of rank 0 on.
  char* slot(int64_t rank) const { return slot_of(rank, turn_); }
  char* own_slot() const { return slot(rank_); }
  int64_t rank_bytes() const { return 2 * header_.slot; }

  // Publishes this rank's slot, or the first half of a two-shot turn, and waits for all. Throws where one calls
  // something else, or doesn't come.
  void meet(bool half = false);
  // Behind meet(), when the slots have been read: begins the next turn.
  void next() { ++turn_; }
  // What is thrown from here on, every rank throws.
  void all_throw() { alone_ = false; }

 private:
  char* slot_of(int64_t rank, int64_t turn) const { return slots_ + (2 * rank + turn % 2) * header_.slot; }
  void publish(bool half);
  void wait_for(int64_t turns);
  bool all_attempt_the_same();
  void compare() const;
  void give_up(int64_t turns, bool ended);

  Call call_;
  Header header_;
  std::atomic<int64_t>* broken_;
  Rank *each_, *mine_;
  char* slots_;
  int64_t rank_, turn_;
  bool compared_ = false, alone_ = true;
  const int exceptions_ = std::uncaught_exceptions();
};

}  // namespace fused_ops

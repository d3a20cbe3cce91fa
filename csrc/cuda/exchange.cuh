// How ranks exchange rows: a workspace is a rank's Mailbox and two slots. In every call
//   1. a block copies its rows to its rank's slot,
//   2. raises a flag for the same block of every rank, and waits for theirs,
//   3. reads the rows of the same number from all slots.
// Flags hold the number of the call, so nothing is ever reset, and a captured graph counts on. Calls use the slots in
// turns: a rank that writes a slot again has seen every rank begin the call in between, and so end the one that read
// it.
#pragma once

#include "row.cuh"

namespace fused_ops {

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
  const unsigned broken = threadIdx.x ? 0 : *(volatile unsigned*)&mine.broken;
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
      if (found >> 32 == number)
        reason = kOtherCall;
      else if ((gone = *broken))
        reason = kGivenUp;
      else if (nanoseconds() - begin > ranks.limit)
        reason = kTimedOut;
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

// Where this call's slot lies in every rank's workspace.
DEVICE long long slot_of(const Ranks& ranks, unsigned number) {
  return (long long)sizeof(Mailbox) + number % 2 * ranks.slot_bytes;
}

}  // namespace fused_ops

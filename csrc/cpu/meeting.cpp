#include "meeting.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>

namespace fused_ops {
namespace {

constexpr uint64_t kMagic = 0x32736f7073667573;
constexpr int64_t kBrokenAt = 64, kRanksAt = 128, kPage = 4096;
constexpr int64_t kIsBroken = int64_t{1} << 62, kHasEnded = int64_t{1} << 61;

int64_t slots_at(int64_t ranks) {
  return (kRanksAt + ranks * static_cast<int64_t>(sizeof(Rank)) + kPage - 1) / kPage * kPage;
}

Rank* ranks_in(const Collective& of) { return reinterpret_cast<Rank*>(of.memory + kRanksAt); }

// A copy has nobody behind it, a forked child isn't who the others wait for.
bool is_of_this_process(const Rank& rank, const Collective& of) {
  return rank.process == getpid() && rank.address == reinterpret_cast<int64_t>(of.memory);
}

}  // namespace

Header header_of(const char* memory, int64_t bytes) {
  Header h{};
  STD_TORCH_CHECK(bytes >= kRanksAt && aligned(memory, 64), "workspace: expected the buffer of an AllReduceWorkspace");
  std::memcpy(&h, memory, sizeof(h));
  const bool known = h.magic == kMagic && h.bytes == bytes && h.ranks >= 1 && h.ranks <= kMostRanks && h.slot > 0 &&
                     h.slot % 64 == 0 && h.slot <= bytes && bytes == slots_at(h.ranks) + h.ranks * 2 * h.slot;
  STD_TORCH_CHECK(known, "workspace: expected the buffer of an AllReduceWorkspace, all of it");
  return h;
}

namespace {

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// Whether a process is gone, or waits for its parent to take note: with one thread, since one whose first thread has
// ended is in the same state while others run.
bool has_ended(int64_t process) {
  if (kill(static_cast<pid_t>(process), 0) && errno == ESRCH) return true;
  char text[512] = {};
  std::snprintf(text, sizeof(text), "/proc/%lld/stat", static_cast<long long>(process));
  std::FILE* const file = std::fopen(text, "r");
  if (!file) return false;
  text[std::fread(text, 1, sizeof(text) - 1, file)] = 0;
  std::fclose(file);
  const char* const name_end = std::strrchr(text, ')');
  char state = 0;
  long threads = 0;
  const int read =
      name_end ? std::sscanf(name_end + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %ld",
                             &state, &threads)
               : 0;
  return read == 2 && threads <= 1 && std::strchr("ZXx", state);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

std::shared_ptr<void> begin_call(const Collective& of) {
  Rank* const mine = ranks_in(of) + of.rank;
  // One rank alone waits for nobody.
  STD_TORCH_CHECK(of.ranks == 1 || is_of_this_process(*mine, of),
                  "workspace: expected the buffer that this process has made as rank ", of.rank, ", not a copy");
  STD_TORCH_CHECK(!mine->calling.exchange(1), "workspace: rank ", of.rank, " is in a call already, by another thread");
  std::shared_ptr<void> begun(mine, [](Rank* rank) { rank->calling.store(0, std::memory_order_release); });
  mine->attempts.fetch_add(1, std::memory_order_relaxed);
  return begun;
}

Meeting::Meeting(const Collective& of, const Call& call)
    : call_(call),
      header_(header_of(of.memory, of.bytes)),
      broken_(reinterpret_cast<std::atomic<int64_t>*>(of.memory + kBrokenAt)),
      each_(ranks_in(of)),
      rank_(of.rank) {
  STD_TORCH_CHECK(rank_ < header_.ranks, "rank: expected 0 to ", header_.ranks - 1);
  mine_ = each_ + rank_;
  slots_ = of.memory + slots_at(header_.ranks);
  STD_TORCH_CHECK(!*broken_, "workspace: a rank has given up waiting");
  turn_ = mine_->turns.load(std::memory_order_relaxed) / 2;
  call_.attempt = mine_->attempts.load(std::memory_order_relaxed);
}

// A call that fails on one rank when the others count on it would be taken for the next one there.
Meeting::~Meeting() {
  int64_t none = 0;
  if (compared_ && alone_ && std::uncaught_exceptions() > exceptions_)
    broken_->compare_exchange_strong(none, kIsBroken | rank_ << 32 | int64_t{1} << rank_);
}

void Meeting::meet(bool half) {
  if (compared_) return publish(half);
  for (;; ++turn_) {
    mine_->calls[turn_ % 2] = call_;
    publish(half);
    if (all_attempt_the_same()) break;
    std::memcpy(slot_of(rank_, turn_ + 1), own_slot(), header_.slot);
  }
  compare();
  compared_ = true;
}

void Meeting::publish(bool half) {
  const int64_t turns = 2 * turn_ + (half ? 1 : 2);
  mine_->turns.store(turns, std::memory_order_release);
  wait_for(turns);
}

// Throws where another rank has refused this call; false where one comes from a call that this rank has refused.
bool Meeting::all_attempt_the_same() {
  const int64_t own = call_.attempt;
  bool same = true, ahead = false;
  int64_t who = 0;
  for (int64_t rank = 0; rank < header_.ranks; ++rank) {
    const int64_t other = each_[rank].calls[turn_ % 2].attempt;
    same &= other == own;
    if (other > own && !ahead) ahead = true, who = rank;
  }
  if (!same) mine_->turns.store(2 * turn_ + 2, std::memory_order_release);  // this turn is over
  STD_TORCH_CHECK(!ahead, "rank ", who, " has refused this call, rank ", rank_, " calls ", text_of(call_));
  return same;
}

void Meeting::wait_for(int64_t turns) {
  // Brief, since with more ranks than cores the one that is waited for may need this one.
  constexpr int kSpins = 512;
  constexpr int64_t kImpatient = 100000000;  // ns after which it sleeps between looks
  int64_t began = 0, looked = 0;
  for (int64_t rank = 0, spins = 0; rank < header_.ranks; ++rank) {
    while (each_[rank].turns.load(std::memory_order_acquire) < turns) {
      if (++spins < kSpins) {
        pause();
        continue;
      }
      const int64_t time = now();
      began = began ? began : time;
      STD_TORCH_CHECK(!*broken_, "workspace: a rank has given up waiting");
      if (time - began > header_.timeout) give_up(turns, false);
      if (time - began < kImpatient) {
        sched_yield();
        continue;
      }
      if (time - looked > kImpatient) {
        looked = time;
        give_up(turns, true);
      }
      usleep(50);
    }
  }
}

void Meeting::compare() const {
  for (int64_t rank = 0; rank < header_.ranks; ++rank) {
    const Call other = each_[rank].calls[turn_ % 2];
    if (!std::memcmp(&other, &call_, sizeof(Call))) continue;
    mine_->turns.store(2 * turn_ + 2, std::memory_order_release);  // this call is over, the workspace goes on
    STD_TORCH_CHECK(false, "rank ", rank, " calls ", text_of(other), ", rank ", rank_, " ", text_of(call_));
  }
}

// On those who are late; `ended`: only such as can't come any more.
void Meeting::give_up(int64_t turns, bool ended) {
  int64_t late = 0, none = 0;
  for (int64_t rank = 0; rank < header_.ranks; ++rank) {
    if (ended && !has_ended(each_[rank].process)) continue;
    late |= int64_t{each_[rank].turns.load(std::memory_order_acquire) < turns} << rank;
  }
  if (!late) return;  // it has come just now
  const int64_t why = kIsBroken | (ended ? kHasEnded : 0) | rank_ << 32 | late;
  broken_->compare_exchange_strong(none, why);
  STD_TORCH_CHECK(false, "workspace: a rank has given up waiting");
}

}  // namespace fused_ops

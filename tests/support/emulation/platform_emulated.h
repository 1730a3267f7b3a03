// CUDA's execution model on the CPU, for the kernels of csrc/cuda: every thread of a block is a fiber that runs until it
// reaches a barrier or a warp operation. Blocks run one after another; the order of blocks and threads is drawn from
// SPARSEMM_EMULATION's seed, so that code which relies on an order fails for some seed. What it reports as an error:
//  - a barrier or warp operation that not all threads reach at the same place (divergence, threads that left early),
//  - misaligned 16-byte accesses,
//  - reads of shared memory that nobody wrote, as NaN or -1 in the results (the memory is filled with ones before each
//    block, and is an allocation of its own, so that AddressSanitizer sees an overrun).
// The fragment layout of mma() is that of the PTX ISA manual, written down here a second time, independently of the
// kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;
constexpr int kExchangeBytes = 32;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  unsigned place = 0;  // source line of the operation it waits at
  int parity = 0;      // which exchange buffer its next warp operation uses
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::vector<char>> exchange[2];  // per warp: one slot a lane
  std::function<void()> kernel;
  std::unique_ptr<char[]> shared;
  std::string failure;
  std::mt19937_64 random{0};
  bool permute = true;
  bool runs = true;  // false: launches are looked at only
  int current = -1;
  int64_t blocks_run = 0;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
};

inline Machine machine;

inline void fail(const std::string& message) {
  if (machine.failure.empty()) machine.failure = message;
}

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer to *from and continues at `to`.
__attribute__((naked, noinline, noipa)) static void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void to_scheduler(bool finished) {
  Fiber& fiber = machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_size);
#else
  (void)finished;
#endif
#if defined(__x86_64__)
  switch_stack(&fiber.stack_pointer, machine.scheduler);
#else
  swapcontext(&fiber.context, &machine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.scheduler_stack, &machine.scheduler_size);
#endif
}

__attribute__((noinline)) inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  machine.kernel();
  machine.fibers[machine.current].state = State::kDone;
  to_scheduler(true);
  std::abort();  // a finished fiber is never continued
}

inline void prepare(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.parity = 0;
  fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{63};
  auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry point, one word for the ABI's alignment
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

inline void resume(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  threadIdx = dim3(static_cast<unsigned>(index));
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  switch_stack(&machine.scheduler, fiber.stack_pointer);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void wait(State state, unsigned place) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  fiber.place = place;
  to_scheduler(false);
}

inline std::string where(const Fiber& fiber) {
  if (fiber.state == State::kDone) return "left the kernel";
  return std::string(fiber.state == State::kAtBlock ? "is at the barrier" : "is at the warp operation") + " of line " +
         std::to_string(fiber.place);
}

// Lets the fibers [begin, end) go on if all wait in `state` at one place.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (machine.fibers[i].state != state || machine.fibers[i].place != machine.fibers[begin].place) return false;
  }
  for (size_t i = begin; i < end; ++i) machine.fibers[i].state = State::kReady;
  return true;
}

inline void shuffle_order(std::vector<int>& order) {
  if (!machine.permute) return;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
}

inline void run_block(const std::function<void()>& kernel, size_t threads, size_t shared_bytes) {
  machine.kernel = kernel;
  machine.shared.reset(new char[shared_bytes + 1]);
  std::memset(machine.shared.get(), 0xff, shared_bytes + 1);
  if (machine.fibers.size() != threads) machine.fibers = std::vector<Fiber>(threads);
  const size_t warps = threads / kWarp;
  for (auto& buffers : machine.exchange) buffers.assign(warps, std::vector<char>(kWarp * kExchangeBytes));
  for (Fiber& fiber : machine.fibers) prepare(fiber);
  std::vector<int> order(threads);
  for (size_t i = 0; i < threads; ++i) order[i] = static_cast<int>(i);
  // Some warps are held back for a while, as long as others can go on: a fault that only shows when one warp overtakes
  // another needs that.
  std::vector<bool> held(warps, false);
  uint64_t until_change = 0;
  for (;;) {
    bool ran = false;
    shuffle_order(order);
    if (machine.permute && until_change-- == 0) {
      for (size_t w = 0; w < warps; ++w) held[w] = machine.random() % 2 == 0;
      until_change = machine.random() % 128;
    }
    for (int pass = 0; pass < 2 && !ran; ++pass) {
      for (int index : order) {
        if (machine.fibers[index].state == State::kReady && (pass == 1 || !held[index / kWarp])) {
          resume(index);
          ran = true;
        }
      }
    }
    bool released = false;
    for (size_t w = 0; w < warps; ++w) released |= release(w * kWarp, (w + 1) * kWarp, State::kAtWarp);
    if (!released) released = release(0, threads, State::kAtBlock);
    if (ran || released) continue;
    for (size_t i = 1; i < threads; ++i) {
      const Fiber &one = machine.fibers[0], &other = machine.fibers[i];
      if (one.state != other.state || (one.state != State::kDone && one.place != other.place)) {
        fail("divergence: thread 0 " + where(one) + ", thread " + std::to_string(i) + " " + where(other));
      }
    }
    break;
  }
  ++machine.blocks_run;
}

template <class F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const F& body) {
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("invalid grid of a launch");
  if (!machine.runs) return;
  gridDim = grid;
  blockDim = block;
  std::vector<int> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  shuffle_order(order);
  for (int index : order) {
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    run_block(body, block.x, shared_bytes);
    if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
  }
}

// Puts `value` where the warp's lanes can read it and waits for them; the result is the warp's slots. Two buffers take
// turns: no lane can be two operations ahead of another.
template <class V>
const char* exchange(const V& value, unsigned place) {
  static_assert(sizeof(V) <= kExchangeBytes);
  Fiber& fiber = machine.fibers[machine.current];
  char* slots = machine.exchange[fiber.parity][machine.current / kWarp].data();
  fiber.parity ^= 1;
  std::memcpy(slots + machine.current % kWarp * kExchangeBytes, &value, sizeof(V));
  wait(State::kAtWarp, place);
  return slots;
}

template <class V>
V slot(const char* slots, int lane) {
  V value;
  std::memcpy(&value, slots + lane * kExchangeBytes, sizeof(V));
  return value;
}

}  // namespace emulation

#define SPARSEMM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulation::launch(dim3(grid), dim3(block), (shared_bytes), [&] { (kernel)(__VA_ARGS__); }))

namespace sparsemm::cuda {

struct bf16 {
  uint16_t bits = 0;
};
using fp16 = _Float16;

using Place = std::source_location;

inline char* shared_memory() { return emulation::machine.shared.get(); }

inline void sync_block(Place place = Place::current()) { emulation::wait(emulation::State::kAtBlock, place.line()); }

template <class V>
V shuffle(V value, int lane, Place place = Place::current()) {
  return emulation::slot<V>(emulation::exchange(value, place.line()), lane % 32);
}
template <class V>
V shuffle_xor(V value, int mask, Place place = Place::current()) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return emulation::slot<V>(emulation::exchange(value, place.line()), lane ^ mask);
}
template <class V>
V shuffle_up(V value, int delta, Place place = Place::current()) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const char* slots = emulation::exchange(value, place.line());
  return lane >= delta ? emulation::slot<V>(slots, lane - delta) : value;
}
inline unsigned ballot(bool predicate, Place place = Place::current()) {
  const char* slots = emulation::exchange(predicate, place.line());
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (emulation::slot<bool>(slots, lane) ? 1u : 0u) << lane;
  return votes;
}
inline unsigned match_any(unsigned value, Place place = Place::current()) {
  const char* slots = emulation::exchange(value, place.line());
  unsigned peers = 0;
  for (int lane = 0; lane < 32; ++lane) peers |= (emulation::slot<unsigned>(slots, lane) == value ? 1u : 0u) << lane;
  return peers;
}
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int first_bit(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline void add_shared(int* target, int value) { *target += value; }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline unsigned float_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline void check_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulation::fail("misaligned 16-byte access");
}
inline uint4 load16(const void* p) {
  check_alignment(p);
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 load16_if(bool present, const void* p) { return present ? load16(p) : uint4{0, 0, 0, 0}; }
inline void store16(void* p, uint4 v) {
  check_alignment(p);
  std::memcpy(p, &v, 16);
}

inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline fp16 from_float<fp16>(float x) {
  return static_cast<fp16>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return bf16{0x7fff};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T>
uint32_t pack(T low, T high) {
  uint16_t parts[2];
  std::memcpy(&parts[0], &low, 2);
  std::memcpy(&parts[1], &high, 2);
  return parts[0] | static_cast<uint32_t>(parts[1]) << 16;
}
inline uint32_t join_low(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t join_high(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, 2);
  return to_float(value);
}

// a_r of lane (g, t): row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next; b_r: rows 2t + 8 r and the next, column g;
// c_i: row g + 8 (i / 2), column 2t + i % 2.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place = Place::current()) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const char* slots = emulation::exchange(mine, place.line());
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const auto left = emulation::slot<Operands>(slots, row % 8 * 4 + k % 8 / 2);
      const auto right = emulation::slot<Operands>(slots, column * 4 + k % 8 / 2);
      sum += half_of<T>(left.a[row / 8 + k / 8 * 2], k % 2) * half_of<T>(right.b[k / 8], k % 2);
    }
    c[i] = sum;
  }
}

}  // namespace sparsemm::cuda

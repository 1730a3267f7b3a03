// select_rows: per row list the highest scores, a different number for each, in column order. One block a list.
//
// A radix search over order-preserving integers finds the lowest kept score in four passes of eight bits; a last pass
// writes the kept columns in order, counting ties from the lowest column on.
#pragma once

#include "args.h"
#include "platform.cuh"

namespace sparsemm::cuda {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;

// Larger score, larger integer; -0 and +0 are one score; NaN above everything, as torch.sort has it.
__device__ __forceinline__ unsigned sort_key(float score) {
  if (score != score) return 0xffffffffu;
  const unsigned bits = float_bits(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Adds one to histogram[bin] for every lane with `valid`; lanes of a warp with one bin share one atomic.
__device__ __forceinline__ void count_bin(int* histogram, unsigned bin, bool valid, int lane) {
  const unsigned peers = match_any(valid ? bin : 0xffffffffu);
  if (valid && first_bit(peers) == lane) add_shared(histogram + bin, count_bits(peers));
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(SelectArgs a) {
  int* histogram = reinterpret_cast<int*>(shared_memory());  // [256]
  int* warp_above = histogram + 256;                         // [kSelectWarps]
  int* warp_ties = warp_above + kSelectWarps;                // [kSelectWarps]
  int* found = warp_ties + kSelectWarps;                     // [2]: bin of the cut, columns wanted from that bin
  const int r = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const float* scores = a.scores + static_cast<int64_t>(r) * a.num_columns;
  const int start = a.starts[r] < 0 ? 0 : a.starts[r];
  const int length = start < a.num_columns ? a.num_columns - start : 0;
  const int count = a.counts[r] < length ? a.counts[r] : length;
  int64_t place = a.cu_kept[r];
  if (count > 0) {
    unsigned cut = 0, mask = 0;
    int wanted = count;  // columns to take among those that agree with `cut` under `mask`
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int bin = thread; bin < 256; bin += kSelectThreads) histogram[bin] = 0;
      sync_block();
      for (int tile = 0; tile < length; tile += kSelectThreads) {
        const int c = tile + thread;
        const unsigned key = c < length ? sort_key(scores[start + c]) : 0;
        count_bin(histogram, key >> shift & 255, c < length && (key & mask) == cut, lane);
      }
      sync_block();
      if (warp == 0) {  // lane i holds the bins 255 - 8 i .. 248 - 8 i, highest first
        int sum = 0;
        for (int j = 0; j < 8; ++j) sum += histogram[255 - lane * 8 - j];
        int inclusive = sum;
        for (int step = 1; step < 32; step *= 2) {
          const int other = shuffle_up(inclusive, step);
          if (lane >= step) inclusive += other;
        }
        int above = inclusive - sum;
        if (above < wanted && wanted <= inclusive) {
          int bin = 255 - lane * 8;
          while (above + histogram[bin] < wanted) above += histogram[bin--];
          found[0] = bin;
          found[1] = wanted - above;
        }
      }
      sync_block();
      cut |= static_cast<unsigned>(found[0]) << shift;
      mask |= 255u << shift;
      wanted = found[1];
      sync_block();  // everybody has read `found` and the histogram before the next pass clears them
    }
    int above_done = 0, ties_done = 0;
    for (int tile = 0; tile < length; tile += kSelectThreads) {
      const int c = tile + thread;
      const unsigned key = c < length ? sort_key(scores[start + c]) : 0;
      const bool above = c < length && key > cut, tie = c < length && key == cut;
      const unsigned above_votes = ballot(above), tie_votes = ballot(tie), lower = (1u << lane) - 1;
      if (lane == 0) {
        warp_above[warp] = count_bits(above_votes);
        warp_ties[warp] = count_bits(tie_votes);
      }
      sync_block();
      int above_before = above_done + count_bits(above_votes & lower);
      int ties_before = ties_done + count_bits(tie_votes & lower);
      for (int w = 0; w < kSelectWarps; ++w) {
        if (w < warp) {
          above_before += warp_above[w];
          ties_before += warp_ties[w];
        }
        above_done += warp_above[w];
        ties_done += warp_ties[w];
      }
      if (above || (tie && ties_before < wanted)) {
        const int64_t target = place + above_before + (ties_before < wanted ? ties_before : wanted);
        if (target < a.total) a.positions[target] = start + c;
      }
      sync_block();
    }
    place += count;
  }
  const int first = start > a.num_columns ? start : a.num_columns;
  for (int c = first + thread; c < a.num_columns + a.window; c += kSelectThreads) {
    if (place + c - first < a.total) a.positions[place + c - first] = c;
  }
}

inline void enqueue_select(const SelectArgs& a, void* stream) {
  if (a.lists == 0) return;
  SPARSEMM_LAUNCH(select_kernel, static_cast<unsigned>(a.lists), kSelectThreads,
                  (256 + 2 * kSelectWarps + 2) * sizeof(int), stream, a);
}

}  // namespace sparsemm::cuda

// compact and append: rows copied as they are, 16 bytes at a time, whatever their dtype.
#pragma once

#include "args.h"
#include "platform.cuh"

namespace sparsemm::cuda {

constexpr int kCopyThreads = 256;
constexpr int kCompactRows = 64;  // kept rows of one block

// The row list that item `item` belongs to: the last r with cu[r] <= item.
__device__ __forceinline__ int list_of_item(const int32_t* cu, int lists, int64_t item) {
  int low = 0, high = lists - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu[middle] <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct CompactRow {
  int64_t source[2];  // byte offset in key and in value
  int64_t target;     // byte offset in both buffers; negative: nothing to copy
};

// Block i copies the kept rows i * kCompactRows .. : its first threads look up where each comes from and goes to, then
// all threads move 16 bytes each, neighbours next to each other.
__global__ void __launch_bounds__(kCopyThreads) compact_kernel(CompactArgs a) {
  CompactRow* rows = reinterpret_cast<CompactRow*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCompactRows;
  const int count = static_cast<int>(a.total - first < kCompactRows ? a.total - first : kCompactRows);
  for (int i = threadIdx.x; i < count; i += kCopyThreads) {
    const int64_t item = first + i;
    const int r = list_of_item(a.cu_kept, a.lists, item);
    const int b = r / a.num_kv_heads, h = r % a.num_kv_heads;
    const int64_t position = a.positions[item], slot = a.offsets[r] + (item - a.cu_kept[r]);
    CompactRow row;
    for (int which = 0; which < 2; ++which) {
      row.source[which] = b * a.stride_b[which] + h * a.stride_h[which] + position * a.stride_t[which];
    }
    // Nothing is read or written out of range, whatever the index tensors hold.
    const bool valid = position >= 0 && position < a.num_columns && slot >= 0 && slot < a.slots;
    row.target = valid ? slot * a.row_bytes : -1;
    rows[i] = row;
  }
  sync_block();
  const int vectors = a.row_bytes / 16;
  for (int which = 0; which < 2; ++which) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count * vectors; i += kCopyThreads) {
      const int row = i / vectors, byte = i % vectors * 16;
      if (rows[row].target >= 0) {
        store16(a.target[which] + rows[row].target + byte, load16(a.source[which] + rows[row].source[which] + byte));
      }
    }
  }
}

// One block a row list. Counts the masked-in columns, then copies them in order behind the rows in tiles of
// kCopyThreads columns; the length moves on only after every thread has read it.
__global__ void __launch_bounds__(kCopyThreads) append_kernel(AppendArgs a) {
  int* warp_counts = reinterpret_cast<int*>(shared_memory());  // [8]
  int* column_rank = warp_counts + kCopyThreads / 32;          // [kCopyThreads]: place among the new rows, or -1
  const int r = blockIdx.x, b = r / a.num_kv_heads, h = r % a.num_kv_heads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const bool* mask = a.mask ? a.mask + b * a.mask_stride_b : nullptr;
  const int64_t begin = a.offsets[r], capacity = a.offsets[r + 1] - begin, length = a.lens[r];
  const int vectors = a.row_bytes / 16;
  int total = a.num_new;
  if (mask) {
    int mine = 0;
    for (int i = thread; i < a.num_new; i += kCopyThreads) mine += mask[i * a.mask_stride_n] ? 1 : 0;
    for (int step = 16; step > 0; step /= 2) mine += shuffle_xor(mine, step);
    if (lane == 0) warp_counts[warp] = mine;
    sync_block();
    total = 0;
    for (int w = 0; w < kCopyThreads / 32; ++w) total += warp_counts[w];
  }
  sync_block();  // every thread has read the length (and the counts) by now
  if (length < 0 || begin < 0 || length + total > capacity || begin + capacity > a.slots) {
    if (thread == 0) *a.overflow = 1;
    return;
  }
  if (thread == 0) a.lens[r] = static_cast<int32_t>(length + total);
  int done = 0;  // new rows of the tiles before this one
  for (int tile = 0; tile < a.num_new; tile += kCopyThreads) {
    const int column = tile + thread;
    const bool stored = column < a.num_new && (!mask || mask[column * a.mask_stride_n]);
    const unsigned votes = ballot(stored);
    if (lane == 0) warp_counts[warp] = count_bits(votes);
    sync_block();
    int before = done;
    for (int w = 0; w < kCopyThreads / 32; ++w) {
      if (w < warp) before += warp_counts[w];
      done += warp_counts[w];
    }
    column_rank[thread] = stored ? before + count_bits(votes & ((1u << lane) - 1)) : -1;
    sync_block();
    const int columns = a.num_new - tile < kCopyThreads ? a.num_new - tile : kCopyThreads;
    for (int i = thread; i < 2 * columns * vectors; i += kCopyThreads) {
      const int which = i / (columns * vectors), rest = i % (columns * vectors);
      const int rank = column_rank[rest / vectors], byte = rest % vectors * 16;
      if (rank < 0) continue;
      const char* source = a.source[which] + b * a.stride_b[which] + h * a.stride_h[which] +
                           (tile + rest / vectors) * a.stride_t[which] + byte;
      store16(a.target[which] + (begin + length + rank) * a.row_bytes + byte, load16(source));
    }
    sync_block();  // the ranks are read before the next tile writes them
  }
}

inline void enqueue_compact(const CompactArgs& a, void* stream) {
  const int64_t blocks = (a.total + kCompactRows - 1) / kCompactRows;
  if (blocks == 0) return;
  SPARSEMM_LAUNCH(compact_kernel, static_cast<unsigned>(blocks), kCopyThreads, kCompactRows * sizeof(CompactRow), stream,
                  a);
}

inline void enqueue_append(const AppendArgs& a, void* stream) {
  if (a.lists == 0) return;
  SPARSEMM_LAUNCH(append_kernel, static_cast<unsigned>(a.lists), kCopyThreads,
                  (kCopyThreads / 32 + kCopyThreads) * sizeof(int), stream, a);
}

}  // namespace sparsemm::cuda

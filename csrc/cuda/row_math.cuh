// Products of a few queries with sixteen rows, for one warp: logits = Q K^T and out += P V.
//
// 16-bit rows go to the tensor cores (mma.m16n8k16) straight from global memory, without shared memory or shuffles:
//  - The order of the dimensions inside a dot product is free as long as Q and K agree, so each lane reads 16 contiguous
//    bytes of a row and calls them the k-indices the instruction wants from it.
//  - P leaves the first product in the layout that the second one takes as its left operand.
//  - V^T is assembled in registers from two rows at a time; the output column a lane gets is again 8 contiguous
//    dimensions.
// P is split into a 16-bit part and its 16-bit remainder, so that no precision is lost against float32.
//
// Fragment layout of every variant, with quad = lane / 4 and part = lane % 4 (half = 0, 1 for 16 queries, 0 for 8):
//   logits[tile][half][i]    query half * 8 + quad, row tile * 8 + part * 2 + i
//   out[e][j][half][i]       query half * 8 + quad, dimension e * 64 + (part * 2 + i) * 8 + j
#pragma once

#include "platform.cuh"

namespace sparsemm::cuda {

// T: element type; kDim: head dimension rounded up to 64, 128 or 256; kQueries: 8 or 16.
template <class T, int kDim, int kQueries>
struct RowMath {
  static constexpr int kHalves = kQueries / 8;
  static constexpr int kKeyChunks = kDim / 32;    // four lanes of a quad hold 32 dimensions
  static constexpr int kValueChunks = kDim / 64;  // eight quads hold 64 dimensions

  using Logits = float[2][kHalves][2];
  using Out = float[kValueChunks][8][kHalves][2];
  struct Query {
    uint4 part[kKeyChunks][kHalves];
  };
  struct Keys {
    uint4 part[2][kKeyChunks];
  };
  struct Values {
    uint4 part[kValueChunks][4];
  };

  // rows[half]: the lane's query (half * 8 + quad), or null for none.
  __device__ static __forceinline__ void load_query(Query& query, const T* const (&rows)[kHalves], int head_dim,
                                                    int lane) {
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int dim = c * 32 + lane % 4 * 8;
        query.part[c][half] = load16_if(rows[half] && dim < head_dim, rows[half] + dim);
      }
    }
  }

  // Rows row .. row + 15 of `base`; those from row_end on read as zero.
  __device__ static __forceinline__ void load_keys(Keys& keys, const T* base, int64_t stride, int64_t row,
                                                   int64_t row_end, int head_dim, int lane) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t mine = row + tile * 8 + lane / 4;
      const int present = mine < row_end ? head_dim : 0, first = lane % 4 * 8;
      const T* source = base + mine * stride + first;
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        keys.part[tile][c] = load16_if(first + c * 32 < present, source + c * 32);
      }
    }
  }

  __device__ static __forceinline__ void load_values(Values& values, const T* base, int64_t stride, int64_t row,
                                                     int64_t row_end, int head_dim, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t mine = row + i / 2 * 8 + lane % 4 * 2 + i % 2;
      const int present = mine < row_end ? head_dim : 0, first = lane / 4 * 8;
      const T* source = base + mine * stride + first;
#pragma unroll
      for (int e = 0; e < kValueChunks; ++e) {
        values.part[e][i] = load16_if(first + e * 64 < present, source + e * 64);
      }
    }
  }

  __device__ static __forceinline__ void logits(const Query& query, const Keys& keys, Logits& s, int) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int chunk = 0; chunk < kKeyChunks; ++chunk) {
        const uint4 low = query.part[chunk][0];
        const uint4 high = kHalves == 2 ? query.part[chunk][kHalves - 1] : uint4{0, 0, 0, 0};
        const uint4 k = keys.part[tile][chunk];
        mma<T>(c, {low.x, high.x, low.y, high.y}, {k.x, k.y});
        mma<T>(c, {low.z, high.z, low.w, high.w}, {k.z, k.w});
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        s[tile][half][0] = c[half * 2];
        s[tile][half][1] = c[half * 2 + 1];
      }
    }
  }

  // load_query, load_keys and logits in one, a few dimensions at a time, where registers are short.
  __device__ static __forceinline__ void stream_logits(const T* const (&rows)[kHalves], const T* base, int64_t stride,
                                                       int64_t row, int64_t row_end, int head_dim, Logits& s,
                                                       int lane) {
    float c[2][4] = {};
    const int64_t mine = row + lane / 4;
    const int first = lane % 4 * 8;
    const T* key = base + mine * stride + first;
#pragma unroll 2
    for (int dim = 0; dim < kDim; dim += 32) {
      const bool present = first + dim < head_dim;
      const uint4 low = load16_if(present && rows[0], rows[0] + first + dim);
      const uint4 high =
          kHalves == 2 ? load16_if(present && rows[kHalves - 1], rows[kHalves - 1] + first + dim) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 k = load16_if(present && mine + tile * 8 < row_end, key + tile * 8 * stride + dim);
        mma<T>(c[tile], {low.x, high.x, low.y, high.y}, {k.x, k.y});
        mma<T>(c[tile], {low.z, high.z, low.w, high.w}, {k.z, k.w});
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        s[tile][half][0] = c[tile][half * 2];
        s[tile][half][1] = c[tile][half * 2 + 1];
      }
    }
  }

  __device__ static __forceinline__ void accumulate(const Logits& p, const Values& values, Out& out, int) {
    uint32_t main_part[4] = {0, 0, 0, 0}, remainder[4] = {0, 0, 0, 0};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const T x = from_float<T>(p[tile][half][0]), y = from_float<T>(p[tile][half][1]);
        main_part[tile * 2 + half] = pack(x, y);
        remainder[tile * 2 + half] =
            pack(from_float<T>(p[tile][half][0] - to_float(x)), from_float<T>(p[tile][half][1] - to_float(y)));
      }
    }
#pragma unroll
    for (int e = 0; e < kValueChunks; ++e) {
      const uint4* v = values.part[e];
      const uint32_t row[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w},
                                  {v[1].x, v[1].y, v[1].z, v[1].w},
                                  {v[2].x, v[2].y, v[2].z, v[2].w},
                                  {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t b[2];
        if (j % 2 == 0) {
          b[0] = join_low(row[0][j / 2], row[1][j / 2]);
          b[1] = join_low(row[2][j / 2], row[3][j / 2]);
        } else {
          b[0] = join_high(row[0][j / 2], row[1][j / 2]);
          b[1] = join_high(row[2][j / 2], row[3][j / 2]);
        }
        float c[4] = {out[e][j][0][0], out[e][j][0][1], 0, 0};
        if (kHalves == 2) {
          c[2] = out[e][j][kHalves - 1][0];
          c[3] = out[e][j][kHalves - 1][1];
        }
        mma<T>(c, main_part, b);
        mma<T>(c, remainder, b);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          out[e][j][half][0] = c[half * 2];
          out[e][j][half][1] = c[half * 2 + 1];
        }
      }
    }
  }
};

// float32: the same layout with ordinary arithmetic, rows read where they are used. For tests and small models.
template <int kDim, int kQueries>
struct RowMath<float, kDim, kQueries> {
  static constexpr int kHalves = kQueries / 8;
  static constexpr int kValueChunks = kDim / 64;

  using Logits = float[2][kHalves][2];
  using Out = float[kValueChunks][8][kHalves][2];
  struct Query {
    const float* row[kHalves];
    int head_dim;
  };
  struct Keys {
    const float* base;
    int64_t stride, row, row_end;
    int head_dim;
  };
  using Values = Keys;

  __device__ static __forceinline__ void load_query(Query& query, const float* const (&rows)[kHalves], int head_dim,
                                                    int) {
    for (int half = 0; half < kHalves; ++half) query.row[half] = rows[half];
    query.head_dim = head_dim;
  }
  __device__ static __forceinline__ void load_keys(Keys& keys, const float* base, int64_t stride, int64_t row,
                                                   int64_t row_end, int head_dim, int) {
    keys = Keys{base, stride, row, row_end, head_dim};
  }
  __device__ static __forceinline__ void load_values(Values& values, const float* base, int64_t stride, int64_t row,
                                                     int64_t row_end, int head_dim, int) {
    values = Values{base, stride, row, row_end, head_dim};
  }

  __device__ static __forceinline__ void logits(const Query& query, const Keys& keys, Logits& s, int lane) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = keys.row + tile * 8 + lane % 4 * 2 + i;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float sum[4] = {0, 0, 0, 0};  // several short sums lose less than one long one
          if (row < keys.row_end && query.row[half]) {
            const float* k = keys.base + row * keys.stride;
            for (int d = 0; d < keys.head_dim; d += 4) {
              for (int j = 0; j < 4; ++j) sum[j] += query.row[half][d + j] * k[d + j];
            }
          }
          s[tile][half][i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
      }
    }
  }

  __device__ static __forceinline__ void stream_logits(const float* const (&rows)[kHalves], const float* base,
                                                       int64_t stride, int64_t row, int64_t row_end, int head_dim,
                                                       Logits& s, int lane) {
    Query query;
    Keys keys;
    load_query(query, rows, head_dim, lane);
    load_keys(keys, base, stride, row, row_end, head_dim, lane);
    logits(query, keys, s, lane);
  }

  __device__ static __forceinline__ void accumulate(const Logits& p, const Values& values, Out& out, int lane) {
#pragma unroll
    for (int r = 0; r < 16; ++r) {  // row r's weights are with part (r % 8) / 2 of the quad
      float weight[kHalves];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) weight[half] = shuffle(p[r / 8][half][r % 2], lane / 4 * 4 + r % 8 / 2);
      if (values.row + r >= values.row_end) continue;
      const float* v = values.base + (values.row + r) * values.stride;
#pragma unroll
      for (int e = 0; e < kValueChunks; ++e) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int dim = e * 64 + (lane % 4 * 2 + i) * 8;
          if (dim >= values.head_dim) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) out[e][j][half][i] += weight[half] * v[dim + j];
          }
        }
      }
    }
  }
};

}  // namespace sparsemm::cuda

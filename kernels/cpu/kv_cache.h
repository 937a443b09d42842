// The paged KV cache: per layer, block and key-value head the keys and then the values of block_size tokens, in bfloat16
// or int8:
//
//   keys    [head_dim / 2][block_size][2]   16 tokens lie side by side, so that their scores need no sum across lanes
//   values  [block_size / 2][head_dim][2]   two tokens lie side by side, as the product of bfloat16 pairs wants them
//   int8:   then float32 scales, [block_size] of keys and [block_size] of values
//
// An int8 vector is that of one token and head, its scale max |x| / 127. Bytes are multiplied as the bfloat16 numbers
// they are, without loss; scales meet the scores and the weights of the softmax, never the vectors.
#pragma once
#include "glue.h"

namespace NB_ISA {

constexpr int kKeys = 64;         // positions a step looks at
constexpr int kMaxHeadDim = 1024;
constexpr int kUnpacked = 2 * kKeys * kMaxHeadDim;  // numbers that int8 keys and values of a step are unpacked to

struct Cache {
  uint8_t* layer;        // of one layer
  int block_size, head_dim, kv_heads;
  bool int8;
  int64_t vectors() const { return (int64_t)block_size * head_dim; }  // numbers in the keys (values) of a block and head
  int64_t head_bytes() const { return int8 ? 2 * vectors() + 8 * block_size : 4 * vectors(); }
  uint8_t* head(int block, int h) const { return layer + ((int64_t)block * kv_heads + h) * head_bytes(); }
};

// Puts one key and one value, [head_dim] of T each, at a token's place. block: keys, then values.
template <class T> inline void place(const Cache& cache, T* block, int offset, const T* key, const T* value) {
  T* v = block + cache.vectors() + (int64_t)(offset / 2) * cache.head_dim * 2 + (offset & 1);
  for (int d = 0; d < cache.head_dim; d++) {
    block[(int64_t)d / 2 * cache.block_size * 2 + offset * 2 + (d & 1)] = key[d];
    v[d * 2] = value[d];
  }
}

inline void write_cache(const Cache& cache, int block, int offset, int h, const float* key, const float* value) {
  uint8_t* head = cache.head(block, h);
  if (cache.int8) {
    int8_t k[kMaxHeadDim], v[kMaxHeadDim];
    float* scales = (float*)(head + 2 * cache.vectors());
    int32_t unused;
    quantize_group(key, cache.head_dim, k, scales + offset, &unused);
    quantize_group(value, cache.head_dim, v, scales + cache.block_size + offset, &unused);
    place(cache, (int8_t*)head, offset, k, v);
  } else {
    uint16_t k[kMaxHeadDim], v[kMaxHeadDim];
    for (int d = 0; d < cache.head_dim; d += 16) {
      f_store_bf16(k + d, f_load(key + d));
      f_store_bf16(v + d, f_load(value + d));
    }
    place(cache, (uint16_t*)head, offset, k, v);
  }
}

// Up to kKeys positions of one head, for every 16 of them where they lie.
struct KeyTile {
  const uint16_t *keys[kKeys / 16], *values[kKeys / 16];
  int stride;            // tokens from one pair of dimensions of the keys to the next
  bool scaled;           // int8: true vectors are these times
  float key_scales[kKeys], value_scales[kKeys];
};

// `lanes` times 16 positions from `position`, a multiple of kKeys, on. bfloat16 is read in place, int8 from `unpacked`.
inline void read_cache(const Cache& cache, int h, const int32_t* table, int position, int lanes, uint16_t* unpacked,
                       KeyTile& tile) {
  int size = cache.block_size, dim = cache.head_dim;
  tile.scaled = cache.int8;
  tile.stride = cache.int8 ? 16 : size;
  for (int l = 0; l < lanes; l++) {
    int token = position + l * 16, offset = token % size;
    const uint8_t* head = cache.head(table[token / size], h);
    if (!cache.int8) {
      tile.keys[l] = (const uint16_t*)head + offset * 2;
      tile.values[l] = (const uint16_t*)head + cache.vectors() + (int64_t)offset * dim;
      continue;
    }
    uint16_t *keys = unpacked + (int64_t)l * 32 * dim, *values = keys + 16 * dim;
    const int8_t *k = (const int8_t*)head + offset * 2, *v = (const int8_t*)head + cache.vectors() + (int64_t)offset * dim;
    for (int i = 0; i < dim / 2; i++) {
      b_store((uint8_t*)(keys + i * 32), p_load_s8(k + (int64_t)i * size * 2));
      b_store((uint8_t*)(values + i * 32), p_load_s8(v + i * 32));
    }
    tile.keys[l] = keys;
    tile.values[l] = values;
    const float* scales = (const float*)(head + 2 * cache.vectors()) + offset;
    memcpy(tile.key_scales + l * 16, scales, sizeof(float) * 16);
    memcpy(tile.value_scales + l * 16, scales + size, sizeof(float) * 16);
  }
}

}  // namespace NB_ISA

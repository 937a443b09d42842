// Attention over the paged cache: softmax(q K^T) V, block by block, with a running maximum (Milakov and Gimelshein 2018;
// Dao et al. 2022).
//
// A query tile is some tokens of one request with all query heads of one key-value head. Keys are taken kKeys at a time,
// at multiples of kKeys, so a row's result does not depend on what it is computed with.
#pragma once
#include "kv_cache.h"

namespace NB_ISA {

constexpr int kQueryRows = 32;    // rows (token, head) of a query tile, at most (one token's heads at least)
constexpr int kMaxHeads = 32;     // query heads of one key-value head, at most: checked by the caller

// The rows of a query tile, and what is kept of each between steps.
struct QueryTile {
  const uint16_t* q;     // bfloat16 [rows, head_dim], scaled
  int rows;
  const int* first;      // [rows] the first position each sees
  const int* last;       // [rows] the last one: its own, or ahead of it
  float* out;            // [rows, head_dim], zeros at first
  float* top;            // [rows] running maximum: at first a sink's score, if there is one
  float* mass;           // [rows] running sum: at first that of the sink
  float* scores;         // [rows, kKeys]
  uint16_t* weights;     // [rows, kKeys] bfloat16
  float soft_cap;        // scores become cap * tanh(scores / cap); 0: they do not
};

// cap * tanh(x / cap)
inline F32 capped(F32 x, float cap) {
  F32 tanh = f_fma(sigmoid(f_mul(x, f_set(2.0f / cap))), f_set(2.0f), f_set(-1.0f));
  return f_mul(tanh, f_set(cap));
}

// scores[r][0 .. 16 * L) = q K^T for L times 16 positions.
template <int R, int L>
inline void score(const uint16_t* q, int dim, const uint16_t* const* keys, int stride, float* scores) {
  F32 acc[R][L];
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) acc[r][l] = f_zero();
  for (int d = 0; d < dim; d += 2) {
    Pairs k[L];
    for (int l = 0; l < L; l++) k[l] = p_load(keys[l] + (int64_t)d * stride);
    for (int r = 0; r < R; r++)
      for (int l = 0; l < L; l++) acc[r][l] = dot2(acc[r][l], k[l], q + r * dim + d);
  }
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) f_store(scores + r * kKeys + l * 16, acc[r][l]);
}

// out[r][0 .. 16 * L) += weights V for L times 16 dimensions.
template <int R, int L>
inline void weigh(const uint16_t* weights, int keys, const uint16_t* const* values, int dim, float* out) {
  F32 acc[R][L];
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) acc[r][l] = f_load(out + r * dim + l * 16);
  for (int k = 0; k < keys; k += 2) {
    const uint16_t* v = values[k / 16] + (int64_t)(k % 16) * dim;
    for (int l = 0; l < L; l++) {
      Pairs pair = p_load(v + l * 32);
      for (int r = 0; r < R; r++) acc[r][l] = dot2(acc[r][l], pair, weights + r * kKeys + k);
    }
  }
  for (int r = 0; r < R; r++)
    for (int l = 0; l < L; l++) f_store(out + r * dim + l * 16, acc[r][l]);
}

// How many times 16 positions or dimensions R rows work on at once.
template <int R> constexpr int kSide = 2 * R <= kAccumulators ? 2 : 1;

template <int R>
inline void score_rows(const QueryTile& tile, int row, int dim, const KeyTile& from, int lanes) {
  const uint16_t* q = tile.q + (int64_t)row * dim;
  float* scores = tile.scores + row * kKeys;
  int l = 0;
  for (; l + kSide<R> <= lanes; l += kSide<R>) score<R, kSide<R>>(q, dim, from.keys + l, from.stride, scores + l * 16);
  if (l < lanes) score<R, 1>(q, dim, from.keys + l, from.stride, scores + l * 16);
}

template <int R>
inline void weigh_rows(const QueryTile& tile, int row, int dim, int keys, const uint16_t* const* values) {
  const uint16_t* shifted[kKeys / 16];
  int d = 0;
  auto at = [&](int offset) {
    for (int i = 0; i * 16 < keys; i++) shifted[i] = values[i] + offset * 2;
    return shifted;
  };
  for (; d + 16 * kSide<R> <= dim; d += 16 * kSide<R>)
    weigh<R, kSide<R>>(tile.weights + row * kKeys, keys, at(d), dim, tile.out + (int64_t)row * dim + d);
  if (d < dim) weigh<R, 1>(tile.weights + row * kKeys, keys, at(d), dim, tile.out + (int64_t)row * dim + d);
}

// Turns a row's scores of `keys` positions from `position` on into weights, and scales what it has so far.
inline void soften(const QueryTile& tile, int row, const KeyTile& seen, int position, int keys, int dim) {
  float* scores = tile.scores + row * kKeys;
  int from = tile.first[row] - position, end = tile.last[row] + 1 - position;
  constexpr float kNone = -1e30f;
  F32 largest = f_set(tile.top[row]);
  for (int i = 0; i < keys; i += 16) {
    F32 s = f_load(scores + i);
    if (seen.scaled) s = f_mul(s, f_load(seen.key_scales + i));
    if (tile.soft_cap) s = capped(s, tile.soft_cap);
    s = f_first(s, end - i, kNone);
    if (from > i) s = f_add(f_first(f_set(kNone), from - i, 0.0f), s);
    f_store(scores + i, s);
    largest = f_max(largest, s);
  }
  float top = f_largest(largest);
  F32 total = f_zero();
  for (int i = 0; i < keys; i += 16) {
    F32 p = f_exp(f_sub(f_load(scores + i), f_set(top)));
    p = f_first(p, end - i, 0.0f);
    if (from > i) p = f_mul(p, f_first(f_zero(), from - i, 1.0f));
    total = f_add(total, p);
    if (seen.scaled) p = f_first(f_mul(p, f_load(seen.value_scales + i)), end - i, 0.0f);
    f_store_bf16(tile.weights + row * kKeys + i, p);
  }
  if (top != tile.top[row]) {
    F32 shrink = f_exp(f_set(tile.top[row] - top));
    for (int d = 0; d < dim; d += 16)
      f_store(tile.out + (int64_t)row * dim + d, f_mul(f_load(tile.out + (int64_t)row * dim + d), shrink));
    tile.mass[row] *= f_largest(shrink);
    tile.top[row] = top;
  }
  tile.mass[row] += f_sum(total);
}

// Calls f(count, first row) for all rows, four at a time and then what is left: a head's keys are read once for them.
template <class F> inline void by_fours(int rows, F f) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  if (rows - r == 3) f(std::integral_constant<int, 3>{}, r);
  if (rows - r == 2) f(std::integral_constant<int, 2>{}, r);
  if (rows - r == 1) f(std::integral_constant<int, 1>{}, r);
}

// The whole of a query tile. table: the request's blocks; unpacked: room for kUnpacked numbers.
inline void attend(const QueryTile& tile, const Cache& cache, int head, const int32_t* table, uint16_t* unpacked) {
  int dim = cache.head_dim, begin = tile.first[0], end = tile.last[0] + 1;
  for (int r = 1; r < tile.rows; r++) {
    if (tile.first[r] < begin) begin = tile.first[r];
    if (tile.last[r] >= end) end = tile.last[r] + 1;
  }
  for (int position = begin / kKeys * kKeys; position < end; position += kKeys) {
    int lanes = (min_int(kKeys, end - position) + 15) / 16;
    KeyTile seen;
    read_cache(cache, head, table, position, lanes, unpacked, seen);
    by_fours(tile.rows, [&](auto rows, int r) { score_rows<decltype(rows)::value>(tile, r, dim, seen, lanes); });
    for (int r = 0; r < tile.rows; r++) soften(tile, r, seen, position, lanes * 16, dim);
    by_fours(tile.rows, [&](auto rows, int r) {
      weigh_rows<decltype(rows)::value>(tile, r, dim, lanes * 16, seen.values);
    });
  }
  for (int r = 0; r < tile.rows; r++) {
    F32 factor = f_set(1.0f / tile.mass[r]);
    for (int d = 0; d < dim; d += 16)
      f_store(tile.out + (int64_t)r * dim + d, f_mul(f_load(tile.out + (int64_t)r * dim + d), factor));
  }
}

}  // namespace NB_ISA

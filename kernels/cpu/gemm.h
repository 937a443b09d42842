// Products with prepared weights: y [rows, n] = x W^T, x prepared as int8 codes by group or as bfloat16.
//
// What one row gives never depends on which other rows are computed with it: every output is summed column by column in
// the same order, group by group, whatever the batch and whichever thread.
//
//   int8:  y = sum over groups g of sx[g] * s[g] * (sum of codes * q  -  z[g] * sum of q)
//   bf16:  y = sum over groups g of s[g] * (sum of codes * x  -  z[g] * sum of x)
//
// Few rows are multiplied with codes unpacked in registers; for more, a piece of a tile is unpacked into the first-level
// cache once and meets all rows there.
#pragma once
#include <type_traits>

#include "abi.h"
#include "pool.h"

namespace NB_ISA {

using nibble::Worker;

constexpr int kMaxRows = 64;      // rows that meet one unpacked piece
constexpr int kDirectRows = kRows;  // up to so many rows, nothing is unpacked into memory
constexpr int kAhead = 2048;      // bytes between what is read and what is fetched
constexpr int kPiece = 256;       // columns of a piece; a multiple of every group
constexpr int kWidth = kTiles * 16;

// The activations of one input: rows of k_padded codes or bfloat16.
struct Activations {
  const void* data;
  const float* scale;    // int8: [rows, groups]; bfloat16: sums of columns by group, where wanted
  const int32_t* sum;    // int8: [rows, groups] sums of codes
  int32_t k_padded, groups;
  bool is_int8;
};

// While one piece is multiplied, the memory that comes next is on its way: a tile is too short for the hardware to see
// where it goes on, and while unpacked codes are multiplied nothing else is read.
template <int Lines> inline void fetch(const uint8_t*& p) {
  for (int i = 0; i < Lines; i++, p += 64) __builtin_prefetch(p, 0, 2);
}

inline int min_int(int a, int b) { return a < b ? a : b; }
inline int columns_of(const NbLinear& w, int k_padded, int group) { return min_int(w.group, k_padded - group * w.group); }

// Where the codes of 8 columns come from. Unpacked: 64 bytes hold 4 columns of 16 outputs.
template <bool Wide_> struct FromBytes {
  static constexpr bool Wide = Wide_;
  static constexpr int kBytes = 16;  // a column of a tile
  explicit FromBytes(const NbLinear&) {}
  void load(const uint8_t* p, Bytes& first, Bytes& second) const { first = b_load(p); second = b_load(p + 64); }
};

struct FromNibbles {
  static constexpr bool Wide = false;
  static constexpr int kBytes = 8;
  explicit FromNibbles(const NbLinear&) {}
  void load(const uint8_t* p, Bytes& first, Bytes& second) const {
    Bytes both = b_load(p);
    first = b_low(both);
    second = b_high(both);
  }
};

struct FromTable {
  static constexpr bool Wide = false;
  static constexpr int kBytes = 8;
  Bytes table;
  explicit FromTable(const NbLinear& w) : table(b_repeat(w.table)) {}
  void load(const uint8_t* p, Bytes& first, Bytes& second) const {
    Bytes both = b_load(p);
    first = b_lookup(table, b_low(both));
    second = b_lookup(table, b_high(both));
  }
};

inline bool is_nibbles(int format) { return format == NB_U4 || format == NB_T4; }
inline int64_t column_bytes(int format) { return is_nibbles(format) ? 8 : format == NB_DENSE ? 32 : 16; }

// One run of groups [first, last) for R rows and T tiles; codes points at column first * group of each tile.
// out: [R][kWidth], added to.
template <int R, int T, class Source>
inline void dot_int8(const NbLinear& w, const Activations& x, int row, int tile, int first, int last,
                     const uint8_t* const* codes, const uint8_t* const* ahead, float* out) {
  constexpr int kShift = Source::Wide ? kWideShift : 0;
  const Source source(w);
  const int8_t* q[R];
  const uint8_t* next[T];
  for (int r = 0; r < R; r++) q[r] = (const int8_t*)x.data + (int64_t)(row + r) * x.k_padded + first * w.group;
  const uint8_t* p[T];
  F32 total[R][T];
  for (int t = 0; t < T; t++) p[t] = codes[t];
  for (int t = 0; t < T; t++) next[t] = ahead ? ahead[t] : nullptr;
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) total[r][t] = f_load(out + r * kWidth + t * 16);
  for (int g = first; g < last; g++) {
    I32 acc[R][T];
    const int32_t* sum = x.sum + (int64_t)row * x.groups + g;
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        int32_t s = sum[r * x.groups];
        if (w.offset == NB_ZEROS)
          acc[r][t] = i_times_u8((const uint8_t*)w.offsets + ((int64_t)(tile + t) * w.groups + g) * 16, -s);
        else
          acc[r][t] = i_set(-w.midpoint * s);
        if constexpr (kShift != 0) acc[r][t] = i_add(acc[r][t], i_set(kShift * s));
      }
    int columns = columns_of(w, x.k_padded, g);
    for (int k = 0; k < columns; k += 8) {
      Bytes a[T], b[T];
      if (ahead)
        for (int t = 0; t < T; t++) fetch<Source::Wide ? 2 : 1>(next[t]);
      for (int t = 0; t < T; t++) source.load(p[t] + k * Source::kBytes, a[t], b[t]);
      Codes eight[R];
      for (int r = 0; r < R; r++) eight[r] = c_load(q[r] + k);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = dot4<Source::Wide, 0>(acc[r][t], a[t], eight[r]);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = dot4<Source::Wide, 1>(acc[r][t], b[t], eight[r]);
    }
    // Two short loops: one long one would not be unrolled, and the sums would live in memory.
    for (int t = 0; t < T; t++) {
      F32 scale = f_load_half((const uint16_t*)w.scales + ((int64_t)(tile + t) * w.groups + g) * 16);
      for (int r = 0; r < R; r++) {
        F32 row_scale = f_set(x.scale[(int64_t)(row + r) * x.groups + g]);
        total[r][t] = f_fma(f_mul(scale, row_scale), f_from(acc[r][t]), total[r][t]);
      }
      p[t] += columns * Source::kBytes;
    }
    for (int t = 0; t < T && w.offset == NB_MINS; t++) {
      F32 minimum = f_load_half((const uint16_t*)w.offsets + ((int64_t)(tile + t) * w.groups + g) * 16);
      for (int r = 0; r < R; r++) {
        F32 row_scale = f_set(x.scale[(int64_t)(row + r) * x.groups + g]);
        total[r][t] = f_fma(f_mul(minimum, row_scale), f_set((float)sum[r * x.groups]), total[r][t]);
      }
    }
    for (int r = 0; r < R; r++) q[r] += columns;
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) f_store(out + r * kWidth + t * 16, total[r][t]);
}

// The scale of a group and what its columns' sum is multiplied by.
inline F32 group_scale(const NbLinear& w, int64_t at) {
  if (w.format == NB_DENSE) return f_set(1.0f);
  return w.format == NB_FP8 ? f_load((const float*)w.scales + at) : f_load_half((const uint16_t*)w.scales + at);
}
inline F32 group_offset(const NbLinear& w, int64_t at, F32 scale) {
  if (w.offset == NB_MINS) return f_load_half((const uint16_t*)w.offsets + at);
  F32 zero = w.offset == NB_ZEROS ? f_load_u8((const uint8_t*)w.offsets + at) : f_set((float)w.midpoint);
  return f_sub(f_zero(), f_mul(zero, scale));
}

// The same for bfloat16 activations; codes are pairs of bfloat16.
template <int R, int T>
inline void dot_bf16(const NbLinear& w, const Activations& x, int row, int tile, int first, int last,
                     const uint8_t* const* codes, const uint8_t* const* ahead, float* out) {
  const uint16_t* h[R];
  const uint8_t* next[T];
  for (int r = 0; r < R; r++) h[r] = (const uint16_t*)x.data + (int64_t)(row + r) * x.k_padded + first * w.group;
  const uint8_t* p[T];
  F32 total[R][T];
  for (int t = 0; t < T; t++) p[t] = codes[t];
  for (int t = 0; t < T; t++) next[t] = ahead ? ahead[t] : nullptr;
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) total[r][t] = f_load(out + r * kWidth + t * 16);
  bool has_offset = is_nibbles(w.format) || w.format == NB_U8;
  for (int g = first; g < last; g++) {
    F32 acc[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) acc[r][t] = f_zero();
    int columns = columns_of(w, x.k_padded, g);
    for (int k = 0; k < columns; k += 2) {
      Pairs a[T];
      if (ahead)
        for (int t = 0; t < T; t++) fetch<1>(next[t]);
      for (int t = 0; t < T; t++) a[t] = p_load(p[t] + k * 32);
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = dot2(acc[r][t], a[t], h[r] + k);
    }
    for (int t = 0; t < T; t++) {
      int64_t at = ((int64_t)(tile + t) * w.groups + g) * 16;
      F32 scale = group_scale(w, at);
      for (int r = 0; r < R; r++) {
        total[r][t] = f_fma(acc[r][t], scale, total[r][t]);
        if (has_offset) {
          F32 sum = f_set(x.scale[(int64_t)(row + r) * x.groups + g]);
          total[r][t] = f_fma(group_offset(w, at, scale), sum, total[r][t]);
        }
      }
      p[t] += columns * 32;
    }
    for (int r = 0; r < R; r++) h[r] += columns;
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) f_store(out + r * kWidth + t * 16, total[r][t]);
}

// Unpack `columns` columns of one tile: to bytes for int8 activations, to pairs of bfloat16 for others.
template <class Source> inline void unpack_bytes(const Source& source, const uint8_t* codes, int columns, uint8_t* out) {
  for (int k = 0; k < columns; k += 8) {
    Bytes a, b;
    source.load(codes + k * 8, a, b);
    b_store(out + k * 16, a);
    b_store(out + k * 16 + 64, b);
  }
}

inline void store_pairs(uint8_t* out, Bytes four_columns) {
  Bytes first = p_join(f_from_byte<0>(four_columns), f_from_byte<1>(four_columns));
  Bytes second = p_join(f_from_byte<2>(four_columns), f_from_byte<3>(four_columns));
  b_store(out, first);
  b_store(out + 64, second);
}

template <class Source> inline void unpack_nibbles(const Source& source, const uint8_t* codes, int columns, uint8_t* out) {
  for (int k = 0; k < columns; k += 8) {
    Bytes a, b;
    source.load(codes + k * 8, a, b);
    store_pairs(out + k * 32, a);
    store_pairs(out + k * 32 + 128, b);
  }
}

inline void unpack_pairs(const NbLinear& w, const uint8_t* codes, int columns, uint8_t* out) {
  if (w.format == NB_U4) unpack_nibbles(FromNibbles(w), codes, columns, out);
  else if (w.format == NB_T4) unpack_nibbles(FromTable(w), codes, columns, out);
  else if (w.format == NB_U8)
    for (int k = 0; k < columns; k += 4) store_pairs(out + k * 32, b_load(codes + k * 16));
  else
    for (int k = 0; k < columns; k += 2)
      b_store(out + k * 32, p_join(f_load_fp8(codes + k * 16), f_load_fp8(codes + k * 16 + 16)));
}

template <int R, int T>
inline void dot_rows(const NbLinear& w, const Activations& x, int row, int tile, int first, int last, bool unpacked,
                     const uint8_t* const* codes, const uint8_t* const* ahead, float* out) {
  if constexpr (T > 1 && R * T > kAccumulators) {
    for (int t = 0; t < T; t++)
      dot_rows<R, 1>(w, x, row, tile + t, first, last, unpacked, codes + t, ahead ? ahead + t : nullptr, out + t * 16);
  } else if (!x.is_int8)
    dot_bf16<R, T>(w, x, row, tile, first, last, codes, ahead, out);
  else if (w.format == NB_U8)
    dot_int8<R, T, FromBytes<true>>(w, x, row, tile, first, last, codes, ahead, out);
  else if (unpacked)
    dot_int8<R, T, FromBytes<false>>(w, x, row, tile, first, last, codes, ahead, out);
  else if (w.format == NB_T4)
    dot_int8<R, T, FromTable>(w, x, row, tile, first, last, codes, ahead, out);
  else
    dot_int8<R, T, FromNibbles>(w, x, row, tile, first, last, codes, ahead, out);
}

template <int T>
inline void dot_block(const NbLinear& w, const Activations& x, int row, int rows, int tile, int first, int last,
                      bool unpacked, const uint8_t* const* codes, const uint8_t* const* ahead, float* out) {
  auto next = [&](auto count, int r) {
    dot_rows<decltype(count)::value, T>(w, x, row + r, tile, first, last, unpacked, codes, r ? nullptr : ahead,
                                        out + r * kWidth);
  };
  int r = 0;
  for (; r + kRows <= rows; r += kRows) next(std::integral_constant<int, kRows>{}, r);
  if constexpr (kRows > 3) {
    if (rows - r == 3) next(std::integral_constant<int, 3>{}, r);
  }
  if (rows - r == 2) next(std::integral_constant<int, 2>{}, r);
  if (rows - r == 1) next(std::integral_constant<int, 1>{}, r);
}

// T tiles for up to kMaxRows rows: out [rows][kWidth] = sums, before multiplier and bias.
template <int T>
inline void multiply(const NbLinear& w, const Activations& x, int row, int rows, int tile, float* out) {
  alignas(64) uint8_t piece[T * kPiece * 32];
  int64_t width = column_bytes(w.format);
  bool pairs = !x.is_int8;
  bool unpack = pairs ? w.format != NB_DENSE : is_nibbles(w.format) && rows > kDirectRows;
  for (int i = 0; i < rows * kWidth; i += 16) f_store(out + i, f_zero());
  int step = unpack || rows > kRows ? kPiece / w.group : w.groups;
  if (step < 1) step = 1;
  for (int g = 0; g < w.groups; g += step) {
    int last = min_int(g + step, w.groups);
    int columns = min_int(last * w.group, x.k_padded) - g * w.group;
    const uint8_t *codes[T], *ahead[T];
    for (int t = 0; t < T; t++) {
      const uint8_t* packed = w.data + ((int64_t)(tile + t) * x.k_padded + (int64_t)g * w.group) * width;
      codes[t] = packed;
      ahead[t] = packed + (unpack ? columns * width : kAhead);
      if (unpack) {
        uint8_t* place = piece + t * kPiece * 32;
        if (pairs) unpack_pairs(w, packed, columns, place);
        else if (w.format == NB_T4) unpack_bytes(FromTable(w), packed, columns, place);
        else unpack_bytes(FromNibbles(w), packed, columns, place);
        codes[t] = place;
      }
    }
    // Pairs of bfloat16 take so long to unpack and multiply that the hardware keeps up by itself.
    dot_block<T>(w, x, row, rows, tile, g, last, unpack, codes, pairs && unpack ? nullptr : ahead, out);
  }
}

// out[r][0 ...] (+)= multiplier * sums + bias, for the outputs that exist.
template <bool Add>
inline void finish(const NbLinear& w, int rows, int tile, int tiles, const float* sums, float* out, int64_t stride) {
  int outputs = min_int(tiles * 16, w.n - tile * 16);
  F32 multiplier = f_set(w.multiplier);
  for (int r = 0; r < rows; r++) {
    float* to = out + r * stride;
    for (int i = 0; i < outputs; i += 16) {
      F32 y = f_mul(f_load(sums + r * kWidth + i), multiplier);
      if (i + 16 <= outputs) {
        if (w.bias) y = f_add(y, f_load(w.bias + tile * 16 + i));
        f_store(to + i, Add ? f_add(f_load(to + i), y) : y);
      } else {
        alignas(64) float lanes[16];
        f_store(lanes, y);
        for (int j = 0; j < outputs - i; j++) {
          float value = lanes[j] + (w.bias ? w.bias[tile * 16 + i + j] : 0.0f);
          to[i + j] = Add ? to[i + j] + value : value;
        }
      }
    }
  }
}

// Tiles [tile, end) for up to kMaxRows rows; out is where the first row's first output goes.
template <bool Add>
inline void product(const NbLinear& w, const Activations& x, int row, int rows, int tile, int end, float* out,
                    int64_t stride) {
  alignas(64) float sums[kMaxRows * kWidth];
  while (tile < end) {
    int tiles = min_int(kTiles, end - tile);
    if (tiles == kTiles) multiply<kTiles>(w, x, row, rows, tile, sums);
    else multiply<1>(w, x, row, rows, tile, sums);
    finish<Add>(w, rows, tile, tiles, sums, out, stride);
    tile += tiles;
    out += tiles * 16;
  }
}

inline int tiles_of(const NbLinear& w) { return (w.n + 15) / 16; }

// How a product is cut into chunks: blocks of rows by blocks of tiles, some for every thread to even out.
struct Grid {
  int row_blocks, tile_blocks, tiles;
  Grid(int rows, int all_tiles, int threads) {
    row_blocks = (rows + kMaxRows - 1) / kMaxRows;
    int wanted = (8 * threads + row_blocks - 1) / row_blocks;
    tiles = all_tiles / wanted / kTiles * kTiles;
    if (tiles < kTiles) tiles = kTiles;
    if (tiles > 16) tiles = 16;
    tile_blocks = (all_tiles + tiles - 1) / tiles;
  }
  int chunks() const { return row_blocks * tile_blocks; }
};

// All linears of a group, their outputs side by side in out [rows, stride].
template <bool Add>
inline void run_group(Worker& worker, const NbLinearGroup& group, const Activations* inputs, int rows, float* out, int64_t stride) {
  auto grid_of = [&](const NbLinear& w) { return Grid(rows, tiles_of(w), worker.threads); };
  int chunks = 0;
  for (int i = 0; i < group.num_linears; i++) chunks += grid_of(group.linears[i]).chunks();
  nibble::parallel(worker, chunks, [&](int chunk) {
    const NbLinear* w = group.linears;
    Grid grid = grid_of(*w);
    int column = 0;
    for (; chunk >= grid.chunks(); grid = grid_of(*w)) {
      chunk -= grid.chunks();
      column += w++->n;
    }
    int row = chunk / grid.tile_blocks * kMaxRows, tile = chunk % grid.tile_blocks * grid.tiles;
    product<Add>(*w, inputs[w->input], row, min_int(kMaxRows, rows - row), tile,
                 min_int(tile + grid.tiles, tiles_of(*w)), out + row * stride + column + tile * 16, stride);
  });
}

}  // namespace NB_ISA

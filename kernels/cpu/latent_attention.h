// Latent attention: all heads of a token see one vector of each token before it, its latent and a rotated key, as the
// keys and values of one head (abi.h: NbLatentAttention; architectures/latent.py).
//
//   cache     of each layer [blocks][block_size][kv_rank + rope_dim] bfloat16; int8: codes, then [block_size][2] scales
//   queries   [tokens][heads / 16][(kv_rank + rope_dim) / 2][16][2] bfloat16: W_k^T q and p of 16 heads side by side
//   scores    a latent's pairs of dimensions, broadcast, meet 16 heads at once: rows of the cache are read as they lie
//   values    two latents at a time side by side, as products of weights and values want them: made once for a tile
//
// Whole prompts go the same way as single tokens, so that a result does not depend on how a prompt is cut up: keys and
// values of the heads are never made. What is seen is taken in segments, each with sums of its own, which are added up in
// order: where there are few tokens, several threads share the segments of one.
#pragma once
#include "attention.h"
#include "isa.h"

namespace NB_ISA {

constexpr int kMaxRank = 512, kMaxTurned = 256, kPackedHeads = 16;  // checked by the caller, as are heads
static_assert(kPackedHeads == nibble::kPackedHeads, "as memory is laid out for them");

struct LatentCache {
  uint8_t* layer;
  int block_size, rank, dim;  // dim: with the rotated key
  bool int8;
  int64_t block_bytes() const { return (int64_t)block_size * (int8 ? dim + 8 : 2 * dim); }
  uint8_t* block(int b) const { return layer + b * block_bytes(); }
  uint16_t* row(int b, int offset) const { return (uint16_t*)block(b) + (int64_t)offset * dim; }
  int8_t* codes(int b, int offset) const { return (int8_t*)block(b) + (int64_t)offset * dim; }
  float* scales(int b, int offset) const { return (float*)(block(b) + (int64_t)block_size * dim) + 2 * offset; }

  void write(int b, int offset, const float* latent, const float* turned) const {
    if (int8) {
      int32_t unused;
      quantize_group(latent, rank, codes(b, offset), scales(b, offset), &unused);
      quantize_group(turned, dim - rank, codes(b, offset) + rank, scales(b, offset) + 1, &unused);
      return;
    }
    uint16_t* to = row(b, offset);
    for (int d = 0; d < rank; d += 16) f_store_bf16(to + d, f_load(latent + d));
    for (int d = rank; d < dim; d += 16) f_store_bf16(to + d, f_load(turned + d - rank));
  }

  // 16 latents from `offset` on as bfloat16, where they lie or in `unpacked`.
  const uint16_t* read(int b, int offset, uint16_t* unpacked) const {
    if (!int8) return row(b, offset);
    for (int t = 0; t < 16; t++) {
      const int8_t* from = codes(b, offset + t);
      for (int d = 0; d < dim; d += 16) {
        alignas(64) float lanes[16];
        for (int i = 0; i < 16; i++) lanes[i] = from[d + i];
        F32 scale = f_set(scales(b, offset + t)[d < rank ? 0 : 1]);
        f_store_bf16(unpacked + t * dim + d, f_mul(f_load(lanes), scale));
      }
    }
    return unpacked;
  }
};

// Where the number d of a head lies among packed queries of a token, by twos.
inline uint32_t* packed(uint16_t* queries, int dim, int head, int d) {
  return (uint32_t*)(queries + (int64_t)(head / kPackedHeads) * kPackedHeads * dim) + d / 2 * kPackedHeads +
         head % kPackedHeads;
}

// x [n] of a head to its places from d on.
inline void pack(const float* x, int n, uint16_t* queries, int dim, int head, int d) {
  alignas(64) uint16_t lanes[16];
  for (int i = 0; i < n; i += 16) {
    f_store_bf16(lanes, f_load(x + i));
    uint32_t* to = packed(queries, dim, head, d + i);
    for (int j = 0; j < 8; j++) memcpy(to + j * kPackedHeads, lanes + 2 * j, 4);
  }
}

// Some tokens of one item with all heads: rows (token, head) of a QueryTile whose head_dim is kv_rank.
struct LatentTile {
  QueryTile rows;
  const uint16_t* queries;  // of the first token
  int tokens, heads;
  int packs() const { return nibble::packs_of(heads); }
};

// scores of 16 latents from `position` on, of which `key` is the first among the tile's keys.
inline void score_latents(const LatentTile& tile, int dim, const uint16_t* latents, int key) {
  constexpr int kStep = 4, kPacks = kSide<kStep>;
  alignas(64) float found[kStep * kKeys];
  int all = tile.tokens * tile.packs();
  auto some = [&](auto count, int first) {
    constexpr int kCount = decltype(count)::value;
    const uint16_t* packs[kCount];
    for (int i = 0; i < kCount; i++) packs[i] = tile.queries + (int64_t)(first + i) * kPackedHeads * dim;
    for (int k = 0; k < 16; k += kStep) {
      score<kStep, kCount>(latents + (int64_t)k * dim, dim, packs, kPackedHeads, found);
      for (int i = 0; i < kCount; i++) {
        int head = (first + i) % tile.packs() * kPackedHeads, row = (first + i) / tile.packs() * tile.heads + head;
        for (int lane = 0; lane < min_int(kPackedHeads, tile.heads - head); lane++)
          for (int j = 0; j < kStep; j++)
            tile.rows.scores[(row + lane) * kKeys + key + k + j] = found[j * kKeys + i * 16 + lane];
      }
    }
  };
  int first = 0;
  for (; first + kPacks <= all; first += kPacks) some(std::integral_constant<int, kPacks>{}, first);
  for (; first < all; first++) some(std::integral_constant<int, 1>{}, first);
}

// 16 latents as values: [8][rank][2].
inline void pair_up(const uint16_t* latents, int dim, int rank, uint16_t* values) {
  for (int t = 0; t < 16; t += 2)
    for (int d = 0; d < rank; d += 16) {
      const uint16_t* from = latents + t * dim + d;
      b_store((uint8_t*)(values + t * rank + 2 * d), p_join(f_load_bf16(from), f_load_bf16(from + dim)));
    }
}

// What a tile sees of one segment. table: the request's blocks; values: room for kKeys * rank; unpacked: for 16 * dim.
inline void attend(const LatentTile& tile, const LatentCache& cache, int segment, const int32_t* table,
                   uint16_t* values, uint16_t* unpacked) {
  const QueryTile& rows = tile.rows;
  int rank = cache.rank, begin = segment * nibble::kSegment;
  int end = min_int(begin + nibble::kSegment, rows.last[rows.rows - 1] + 1);
  for (int r = 0; r < rows.rows; r++) rows.top[r] = -1e30f, rows.mass[r] = 0.0f;
  memset(rows.out, 0, sizeof(float) * rows.rows * rank);
  KeyTile seen;
  seen.scaled = false;
  for (int position = begin; position < end; position += kKeys) {
    int lanes = (min_int(kKeys, end - position) + 15) / 16;
    for (int l = 0; l < lanes; l++) {
      int token = position + l * 16;
      const uint16_t* latents = cache.read(table[token / cache.block_size], token % cache.block_size, unpacked);
      score_latents(tile, cache.dim, latents, l * 16);
      pair_up(latents, cache.dim, rank, values + l * 16 * rank);
      seen.values[l] = values + l * 16 * rank;
    }
    for (int r = 0; r < rows.rows; r++) soften(rows, r, seen, position, lanes * 16, rank);
    by_fours(rows.rows, [&](auto count, int r) {
      weigh_rows<decltype(count)::value>(rows, r, rank, lanes * 16, seen.values);
    });
  }
}

// What rows have of several segments, added up: out [rows][rank], top, mass of one after the other.
struct Sums {
  float *out, *top, *mass;

  void add(const Sums& more, int rows, int rank) const {
    for (int r = 0; r < rows; r++) {
      float highest = top[r] > more.top[r] ? top[r] : more.top[r];
      F32 own = f_exp(f_set(top[r] - highest)), other = f_exp(f_set(more.top[r] - highest));
      float *to = out + (int64_t)r * rank, *from = more.out + (int64_t)r * rank;
      for (int d = 0; d < rank; d += 16) f_store(to + d, f_fma(f_load(from + d), other, f_mul(f_load(to + d), own)));
      mass[r] = f_largest(f_fma(f_set(more.mass[r]), other, f_mul(f_set(mass[r]), own)));
      top[r] = highest;
    }
  }
};

// One layer in a step (forward.h).
template <class Step> struct LatentStep {
  const Step& s;
  int layer;
  const NbLatentAttention& a;
  LatentCache cache;

  int tokens() const { return s.batch.num_tokens; }
  int dim() const { return a.kv_rank + a.rope_dim; }
  int query_width() const { return a.num_heads * (a.nope_dim + a.rope_dim); }
  uint16_t* queries(int row) const { return s.b.queries + (int64_t)row * nibble::packed_width(a); }
  InputBuffer head_inputs() const { return {s.b.head_inputs, s.b.head_scales, s.b.head_sums}; }
  // What the first product gave.
  float* made(int row) const { return s.b.qkv + (int64_t)row * nibble::width_of(a); }
  float* latent(int row) const { return made(row) + nibble::width_of(a) - dim(); }
  float* query(int row) const { return a.q_rank ? s.b.convolved + (int64_t)row * query_width() : made(row); }

  void rotate(int row, float* x) const {
    const NbRope& rope = s.m.ropes[a.rope];
    const float* cosines = s.b.angles[a.rope] + (int64_t)row * rope.dim;
    NB_ISA::rotate(x, rope, cosines, cosines + rope.dim / 2);
  }

  // Norm, rotate and store a row's latent.
  void keep(int row) const {
    float *c = latent(row), *turned = c + a.kv_rank;
    int position = s.position_of(row);
    rms_norm(c, a.kv_norm, a.kv_rank, a.eps, c);
    rotate(row, turned);
    int block = s.table_of(layer, s.item_of(row))[position / s.m.block_size];
    cache.write(block, position % s.m.block_size, c, turned);
  }

  // A row's queries, scaled: what W_k meets, as inputs; what turns, to its place.
  void split_queries(Worker& worker, int row) const {
    F32 scale = f_set(Step::query_scale(a, s.position_of(row)));
    for (int h = 0; h < a.num_heads; h++) {
      float *q = query(row) + h * (a.nope_dim + a.rope_dim), *turned = q + a.nope_dim;
      rotate(row, turned);
      for (int i = 0; i < a.nope_dim + a.rope_dim; i += 16) f_store(q + i, f_mul(f_load(q + i), scale));
      prepare(a.keys.inputs[0], head_inputs(), h * tokens() + row, q, (float*)worker.scratch);
      pack(turned, a.rope_dim, queries(row), dim(), h, a.kv_rank);
    }
  }

  // W_k^T q: a chunk is 16 heads, which lie in the same lines of memory, some rows and some columns of the latents.
  void absorb(Worker& worker) const {
    Grid grid(tokens(), a.kv_rank / 16, worker.threads);
    int packs = nibble::packs_of(a.num_heads);
    nibble::parallel(worker, packs * grid.chunks(), [&](int chunk) {
      int pack_first = chunk / grid.chunks() * kPackedHeads, part = chunk % grid.chunks();
      int row = part / grid.tile_blocks * kMaxRows, rows = min_int(kMaxRows, tokens() - row);
      int tile = part % grid.tile_blocks * grid.tiles, end = min_int(tile + grid.tiles, a.kv_rank / 16);
      int columns = (end - tile) * 16;
      float* products = (float*)worker.scratch;
      for (int h = pack_first; h < min_int(pack_first + kPackedHeads, a.num_heads); h++) {
        product<false>(a.keys.linears[h], view(a.keys.inputs[0], head_inputs()), h * tokens() + row, rows, tile, end,
                       products, columns);
        for (int r = 0; r < rows; r++) pack(products + r * columns, columns, queries(row + r), dim(), h, tile * 16);
      }
    });
  }

  struct Scratch {
    static constexpr int kRows = nibble::kLatentRows;
    float scores[kRows * kKeys];
    uint16_t weights[kRows * kKeys];
    float top[2][kRows], mass[2][kRows];
    int first[kRows], last[kRows];
    float out[2][kRows * kMaxRank];
    uint16_t values[kKeys * kMaxRank];
    uint16_t unpacked[16 * (kMaxRank + kMaxTurned)];
    float padded[kMaxRank + 16];

    Sums sums(int i) { return {out[i], top[i], mass[i]}; }
  };

  static Scratch& scratch(Worker& worker) {
    static_assert(sizeof(Scratch) <= nibble::kScratch, "more than a thread has");
    return *(Scratch*)worker.scratch;
  }

  // Tokens [unit.first, unit.first + unit.count) of an item over one segment.
  void attend_segment(Scratch& w, const nibble::Unit& unit, int segment, const Sums& to) const {
    const NbItem& item = s.batch.items[unit.item];
    int row = s.b.item_rows[unit.item] + unit.first, rows = unit.count * a.num_heads;
    for (int r = 0; r < rows; r++) {
      w.first[r] = 0;
      w.last[r] = item.start + unit.first + r / a.num_heads;
    }
    QueryTile tile{nullptr, rows, w.first, w.last, to.out, to.top, to.mass, w.scores, w.weights, 0.0f};
    attend({tile, queries(row), unit.count, a.num_heads}, cache, segment, s.table_of(layer, unit.item), w.values,
           w.unpacked);
  }

  int segments(const nibble::Unit& unit) const {
    return nibble::segments_of(s.batch.items[unit.item].start + unit.first + unit.count);
  }

  // What the heads of a unit have found becomes inputs of W_v.
  void leave(Scratch& w, const nibble::Unit& unit, const Sums& found) const {
    int row = s.b.item_rows[unit.item] + unit.first;
    for (int r = 0; r < unit.count * a.num_heads; r++) {
      float* out = found.out + (int64_t)r * a.kv_rank;
      F32 factor = f_set(1.0f / found.mass[r]);
      for (int d = 0; d < a.kv_rank; d += 16) f_store(out + d, f_mul(f_load(out + d), factor));
      prepare(a.values.inputs[0], head_inputs(), r % a.num_heads * tokens() + row + r / a.num_heads, out, w.padded);
    }
  }

  void attend_unit(Worker& worker, const nibble::Unit& unit) const {
    Scratch& w = scratch(worker);
    attend_segment(w, unit, 0, w.sums(0));
    for (int i = 1; i < segments(unit); i++) {
      attend_segment(w, unit, i, w.sums(1));
      w.sums(0).add(w.sums(1), unit.count * a.num_heads, a.kv_rank);
    }
    leave(w, unit, w.sums(0));
  }

  // Where the sums of one segment of a unit wait for the others.
  Sums partial(int unit, int segment, int most) const {
    int rows = nibble::unit_tokens(a) * a.num_heads;
    float* at = s.b.partials + ((int64_t)unit * most + segment) * nibble::partial_width(a);
    return {at, at + (int64_t)rows * a.kv_rank, at + (int64_t)rows * (a.kv_rank + 1)};
  }

  // Each segment by itself, for as many threads as there are; most: segments that a unit has.
  void attend_by_segments(Worker& worker, const nibble::Units& units, int most) const {
    nibble::parallel(worker, units.count * most, [&](int chunk) {
      const nibble::Unit& unit = units.at[chunk / most];
      if (chunk % most < segments(unit))
        attend_segment(scratch(worker), unit, chunk % most, partial(chunk / most, chunk % most, most));
    });
    nibble::parallel(worker, units.count, [&](int chunk) {
      const nibble::Unit& unit = units.at[chunk];
      Sums all = partial(chunk, 0, most);
      for (int i = 1; i < segments(unit); i++) all.add(partial(chunk, i, most), unit.count * a.num_heads, a.kv_rank);
      leave(scratch(worker), unit, all);
    });
  }

  // W_v: a chunk is one head and some rows.
  void make_values(Worker& worker) const {
    int blocks = (tokens() + kMaxRows - 1) / kMaxRows, all = a.num_heads * a.value_dim;
    nibble::parallel(worker, a.num_heads * blocks, [&](int chunk) {
      int h = chunk / blocks, row = chunk % blocks * kMaxRows;
      product<false>(a.values.linears[h], view(a.values.inputs[0], head_inputs()), h * tokens() + row,
                     min_int(kMaxRows, tokens() - row), 0, a.value_dim / 16,
                     s.b.attended + (int64_t)row * all + h * a.value_dim, all);
    });
  }

  // h is in its place.
  void run(Worker& worker, const float* after) const {
    s.products(worker, a.in, s.b.qkv, nibble::width_of(a), false);
    for_rows(worker, tokens(), [&](int row) {
      keep(row);
      if (!a.q_rank) return split_queries(worker, row);
      rms_norm(made(row), a.q_norm, a.q_rank, a.eps, made(row));
      prepare_all(a.q_b, s.inputs, row, made(row), (float*)worker.scratch);
    });
    if (a.q_rank) {
      s.products(worker, a.q_b, s.b.convolved, query_width(), false);
      for_rows(worker, tokens(), [&](int row) { split_queries(worker, row); });
    }
    absorb(worker);
    const nibble::Units& units = s.b.units[nibble::unit_tokens(a)];
    int most = nibble::Sharing(a, s.batch, worker.threads).segments;
    if (most > 1) attend_by_segments(worker, units, most);
    else
      nibble::parallel(worker, units.count, [&](int chunk) { attend_unit(worker, units.at[units.count - 1 - chunk]); });
    make_values(worker);
    s.prepare_rows(worker, a.o, s.b.attended, a.num_heads * a.value_dim);
    s.add_product(worker, a.o, after);
  }
};

}  // namespace NB_ISA

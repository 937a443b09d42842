// The decoder, from token ids (or hidden states) to hidden states, as one program of phases for the whole team:
//
//   x -> input norm -> qkv -> (q, k norm) -> RoPE, cache -> attention -> o -> (norm) -> + x
//     -> mlp norm -> gate_up -> act(gate) * up -> down -> (norm) -> + x
//
// Activations between the products are float32; a product's inputs are int8 codes or bfloat16.
#pragma once
#include "attention.h"
#include "isa.h"

namespace NB_ISA {

using nibble::LinearJob;
using nibble::LogitsJob;
using nibble::StepBuffers;
using nibble::StepJob;

// Calls f(row) for every row, some rows a chunk.
template <class F> inline void for_rows(Worker& worker, int rows, F f) {
  int size = rows / (4 * worker.threads);
  size = size < 1 ? 1 : size > 16 ? 16 : size;
  nibble::parallel(worker, (rows + size - 1) / size, [&](int chunk) {
    for (int row = chunk * size; row < min_int(rows, (chunk + 1) * size); row++) f(row);
  });
}

struct Step {
  const NbModel& m;
  const NbBatch& batch;
  const StepBuffers& b;
  float* x;                       // [tokens, hidden]
  InputBuffer inputs[NB_MAX_INPUTS];

  Step(const StepJob& job) : m(*job.model), batch(*job.batch), b(*job.buffers), x(job.hidden) {
    for (int i = 0; i < NB_MAX_INPUTS; i++) inputs[i] = {b.inputs[i], b.scales[i], b.sums[i]};
  }

  int heads_dim() const { return m.num_heads * m.head_dim; }
  int qkv_dim() const { return (m.num_heads + 2 * m.num_kv_heads) * m.head_dim; }
  Cache cache(int layer) const {
    Cache first{batch.cache, m.block_size, m.head_dim, m.num_kv_heads, batch.cache_int8 != 0};
    first.layer += layer * batch.num_blocks * m.num_kv_heads * first.head_bytes();
    return first;
  }

  void products(Worker& worker, const NbLinearGroup& group, float* out, int stride, bool add) const {
    Activations views[NB_MAX_INPUTS];
    for (int i = 0; i < group.num_inputs; i++) views[i] = view(group.inputs[i], inputs[i]);
    if (add) run_group<true>(worker, group, views, batch.num_tokens, out, stride);
    else run_group<false>(worker, group, views, batch.num_tokens, out, stride);
  }

  // x of a row += norm of what the last product gave, where the architecture norms it (else it has been added already).
  void add_normed(Worker& worker, int row, const float* weight) const {
    if (!weight) return;
    float* normed = (float*)worker.scratch;
    rms_norm(b.y + (int64_t)row * m.hidden, weight, m.hidden, m.eps, normed);
    float* to = x + (int64_t)row * m.hidden;
    for (int i = 0; i < m.hidden; i++) to[i] += normed[i];
  }

  void norm_and_prepare(Worker& worker, int row, const float* weight, const NbLinearGroup& group) const {
    const float* from = x + (int64_t)row * m.hidden;
    float* normed = (float*)worker.scratch;
    if (weight) rms_norm(from, weight, m.hidden, m.eps, normed);
    prepare_all(group, inputs, row, weight ? normed : from, normed + m.hidden);
  }

  void prepare_rows(Worker& worker, const NbLinearGroup& group, const float* from, int width) const {
    for_rows(worker, batch.num_tokens, [&](int row) {
      prepare_all(group, inputs, row, from + (int64_t)row * width, (float*)worker.scratch);
    });
  }

  void embed(int row) const {
    const uint16_t* from = m.embedding + (int64_t)batch.tokens[row] * m.hidden;
    for (int i = 0; i < m.hidden; i += 16)
      f_store(x + (int64_t)row * m.hidden + i, f_mul(f_load_bf16(from + i), f_set(m.embedding_scale)));
  }

  // Where a row's token stands: its item is the last that begins at or before it.
  int item_of(int row) const { return b.row_items[row]; }
  int position_of(int row) const {
    int item = item_of(row);
    return batch.items[item].start + row - b.item_rows[item];
  }

  void angles(int row) const {
    for (int kind = 0; kind < 2; kind++) {
      if (!m.inv_freq[kind]) continue;
      int half = m.rotary_dim[kind] / 2;
      float* to = b.angles[kind] + (int64_t)row * m.head_dim;
      for (int i = 0; i < half; i++) {
        float angle = (float)position_of(row) * m.inv_freq[kind][i];
        to[i] = cosf(angle) * m.rope_factor[kind];
        to[half + i] = sinf(angle) * m.rope_factor[kind];
      }
    }
  }

  float query_scale(int position) const {
    if (!m.query_length) return m.attention_scale;
    return m.attention_scale * (1.0f + m.query_beta * log1pf((float)(position / m.query_length)));
  }

  // Norm, rotate and store a row's queries (bfloat16, [kv_heads][tokens][heads of one][head_dim], scaled), keys and
  // values.
  void rotate_and_store(int row, const NbLayer& layer, const Cache& to) const {
    int dim = m.head_dim, shared = m.num_heads / m.num_kv_heads;
    float* qkv = b.qkv + (int64_t)row * qkv_dim();
    int turned = m.rotary_dim[layer.rope];
    const float *cosines = b.angles[layer.rope] + (int64_t)row * dim, *sines = cosines + turned / 2;
    int position = position_of(row), block = batch.tables[batch.items[item_of(row)].table + position / m.block_size];
    bool norm_heads = layer.q_norm && !m.qk_norm_all;
    if (layer.q_norm && m.qk_norm_all) {
      float* keys = qkv + heads_dim();
      rms_norm(qkv, layer.q_norm, heads_dim(), m.eps, qkv);
      rms_norm(keys, layer.k_norm, m.num_kv_heads * dim, m.eps, keys);
    }
    F32 scale = f_set(query_scale(position));
    for (int h = 0; h < m.num_heads; h++) {
      float* q = qkv + h * dim;
      if (norm_heads) rms_norm(q, layer.q_norm, dim, m.eps, q);
      rotate(q, turned, cosines, sines);
      uint16_t* out = b.queries + (((int64_t)(h / shared) * batch.num_tokens + row) * shared + h % shared) * dim;
      for (int d = 0; d < dim; d += 16) f_store_bf16(out + d, f_mul(f_load(q + d), scale));
    }
    for (int h = 0; h < m.num_kv_heads; h++) {
      float *k = qkv + (m.num_heads + h) * dim, *v = k + m.num_kv_heads * dim;
      if (norm_heads) rms_norm(k, layer.k_norm, dim, m.eps, k);
      rotate(k, turned, cosines, sines);
      write_cache(to, block, position % m.block_size, h, k, v);
    }
  }

  // One query tile: tokens [unit.first, unit.first + unit.count) of an item, one kv head.
  void attend_unit(Worker& worker, const nibble::Unit& unit, int head, const NbLayer& layer, const Cache& from) const {
    int dim = m.head_dim, shared = m.num_heads / m.num_kv_heads;
    struct Scratch {
      float scores[kQueryRows * kKeys];
      uint16_t weights[kQueryRows * kKeys];
      float top[kQueryRows], mass[kQueryRows];
      int first[kQueryRows], last[kQueryRows];
      float out[kQueryRows * kMaxHeadDim];
      uint16_t unpacked[kUnpacked];
    };
    static_assert(sizeof(Scratch) <= nibble::kScratch, "more than a thread has");
    Scratch& s = *(Scratch*)worker.scratch;
    const NbItem& item = batch.items[unit.item];
    int row = b.item_rows[unit.item] + unit.first, rows = unit.count * shared;
    for (int r = 0; r < rows; r++) {
      int position = item.start + unit.first + r / shared;
      s.last[r] = position;
      s.first[r] = layer.window && position + 1 > layer.window ? position + 1 - layer.window : 0;
      s.top[r] = -1e30f;
      s.mass[r] = 0.0f;
    }
    memset(s.out, 0, sizeof(float) * rows * dim);
    const uint16_t* q = b.queries + ((int64_t)head * batch.num_tokens + row) * shared * dim;
    attend({q, rows, s.first, s.last, s.out, s.top, s.mass, s.scores, s.weights}, from, head,
           batch.tables + item.table, s.unpacked);
    for (int r = 0; r < rows; r++)
      memcpy(b.attended + (int64_t)(row + r / shared) * heads_dim() + (head * shared + r % shared) * dim, s.out + r * dim,
             sizeof(float) * dim);
  }

  void gate_up(Worker& worker, const NbLinearGroup& group) const {
    const NbLinear &gate = group.linears[0], &up = group.linears[1];
    Activations from_gate = view(group.inputs[gate.input], inputs[gate.input]);
    Activations from_up = view(group.inputs[up.input], inputs[up.input]);
    Grid grid(batch.num_tokens, tiles_of(gate), worker.threads);
    nibble::parallel(worker, grid.chunks(), [&](int chunk) {
      int row = chunk / grid.tile_blocks * kMaxRows, tile = chunk % grid.tile_blocks * grid.tiles;
      int rows = min_int(kMaxRows, batch.num_tokens - row), end = min_int(tile + grid.tiles, tiles_of(gate));
      int columns = (end - tile) * 16;
      float *gates = (float*)worker.scratch, *ups = gates + kMaxRows * 256;
      product<false>(gate, from_gate, row, rows, tile, end, gates, columns);
      product<false>(up, from_up, row, rows, tile, end, ups, columns);
      int outputs = min_int(columns, gate.n - tile * 16);
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < outputs; i += 16) {
          F32 y = f_mul(activate(f_load(gates + r * columns + i), m.activation), f_load(ups + r * columns + i));
          f_store(b.inner + (int64_t)(row + r) * m.intermediate + tile * 16 + i, y);
        }
    });
  }

  void attention(Worker& worker, const NbLayer& layer, const Cache& kv) const {
    products(worker, layer.qkv, b.qkv, qkv_dim(), false);
    for_rows(worker, batch.num_tokens, [&](int row) { rotate_and_store(row, layer, kv); });
    nibble::parallel(worker, b.num_units * m.num_kv_heads, [&](int chunk) {
      int unit = b.num_units - 1 - chunk / m.num_kv_heads;  // long ones first
      attend_unit(worker, b.units[unit], chunk % m.num_kv_heads, layer, kv);
    });
    prepare_rows(worker, layer.o, b.attended, heads_dim());
    bool normed = layer.post_attention_norm != nullptr;
    products(worker, layer.o, normed ? b.y : x, m.hidden, !normed);
  }

  void run(Worker& worker) const {
    const float* last_norm = nullptr;
    for (int l = 0; l < m.num_layers; l++) {
      const NbLayer& layer = m.layers[l];
      for_rows(worker, batch.num_tokens, [&](int row) {
        if (l == 0) {
          if (m.embedding) embed(row);
          angles(row);
        }
        add_normed(worker, row, last_norm);
        norm_and_prepare(worker, row, layer.input_norm, layer.qkv);
      });
      attention(worker, layer, cache(l));
      for_rows(worker, batch.num_tokens, [&](int row) {
        add_normed(worker, row, layer.post_attention_norm);
        norm_and_prepare(worker, row, layer.mlp_norm, layer.gate_up);
      });
      gate_up(worker, layer.gate_up);
      prepare_rows(worker, layer.down, b.inner, m.intermediate);
      last_norm = layer.post_mlp_norm;
      products(worker, layer.down, last_norm ? b.y : x, m.hidden, !last_norm);
    }
    for_rows(worker, batch.num_tokens, [&](int row) {
      add_normed(worker, row, last_norm);
      float* hidden = x + (int64_t)row * m.hidden;
      if (m.norm) rms_norm(hidden, m.norm, m.hidden, m.eps, hidden);
    });
  }
};

inline void group_rows(Worker& worker, const NbLinearGroup& group, const StepBuffers& b, int rows, float* out, int stride,
                       const float* x, int width) {
  InputBuffer buffers[NB_MAX_INPUTS];
  Activations views[NB_MAX_INPUTS];
  for (int i = 0; i < group.num_inputs; i++) {
    buffers[i] = {b.inputs[i], b.scales[i], b.sums[i]};
    views[i] = view(group.inputs[i], buffers[i]);
  }
  for_rows(worker, rows, [&](int row) {
    prepare_all(group, buffers, row, x + (int64_t)row * width, (float*)worker.scratch);
  });
  run_group<false>(worker, group, views, rows, out, stride);
}

inline void forward(Worker& worker, void* job) { Step(*(StepJob*)job).run(worker); }

inline void logits(Worker& worker, void* argument) {
  const LogitsJob& job = *(LogitsJob*)argument;
  const NbModel& m = *job.model;
  group_rows(worker, m.head, *job.buffers, job.rows, job.logits, m.vocab, job.hidden, m.hidden);
}

inline void linear(Worker& worker, void* argument) {
  const LinearJob& job = *(LinearJob*)argument;
  int width = 0;
  for (int i = 0; i < job.group->num_linears; i++) width += job.group->linears[i].n;
  group_rows(worker, *job.group, *job.buffers, job.rows, job.y, width, job.x, job.group->inputs[0].k);
}

extern const nibble::Kernels kKernels;
const nibble::Kernels kKernels = {forward, logits, linear};

}  // namespace NB_ISA

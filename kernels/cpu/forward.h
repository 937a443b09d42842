// The decoder, from token ids (or hidden states) to hidden states, as one program of phases for the whole team:
//
//   x -> input norm -> qkv -> (q, k norm) -> RoPE, cache -> attention (-> gate) -> o -> (norm) -> + x
//   or                 q k v, z, b, a -> convolution -> gated delta rule -> norm, gate -> out
//   or                 z, x B C, dt -> convolution -> state space -> gate, norm -> out
//   or                 B, C, x -> C * convolution of B * x -> out
//   or                 latent_attention.h
//     -> mlp norm -> gate_up -> act(gate) * up -> down -> (norm) -> + x      or experts.h
//
// Activations between the products are float32; a product's inputs are int8 codes or bfloat16.
#pragma once
#include "alt_up.h"
#include "attention.h"
#include "delta_net.h"
#include "experts.h"
#include "isa.h"
#include "latent_attention.h"
#include "mamba2.h"

namespace NB_ISA {

using nibble::LinearJob;
using nibble::LogitsJob;
using nibble::StepBuffers;
using nibble::StepJob;

struct Step {
  const NbModel& m;
  const NbBatch& batch;
  const StepBuffers& b;
  float* x;                       // [tokens, hidden]
  InputBuffer inputs[NB_MAX_INPUTS];

  Step(const StepJob& job) : m(*job.model), batch(*job.batch), b(*job.buffers), x(job.hidden) {
    for (int i = 0; i < NB_MAX_INPUTS; i++) inputs[i] = {b.inputs[i], b.scales[i], b.sums[i]};
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
    rms_norm(b.y + (int64_t)row * m.hidden, weight, m.hidden, m.after_eps, normed);
    float* to = x + (int64_t)row * m.hidden;
    for (int i = 0; i < m.hidden; i++) to[i] += normed[i];
  }

  void norm_and_prepare(Worker& worker, int row, const float* weight, const NbLinearGroup& group) const {
    const float* from = x + (int64_t)row * m.hidden;
    float* normed = (float*)worker.scratch;
    if (weight) rms_norm(from, weight, m.hidden, m.eps, normed);
    prepare_all(group, inputs, row, weight ? normed : from, normed + m.hidden);
  }

  void norm_for_experts(int row, const float* weight) const {
    const float* from = x + (int64_t)row * m.hidden;
    float* to = b.experts.h + (int64_t)row * m.hidden;
    if (weight) rms_norm(from, weight, m.hidden, m.eps, to);
    else memcpy(to, from, sizeof(float) * m.hidden);
  }

  void prepare_rows(Worker& worker, const NbLinearGroup& group, const float* from, int width) const {
    for_rows(worker, batch.num_tokens, [&](int row) {
      prepare_all(group, inputs, row, from + (int64_t)row * width, (float*)worker.scratch);
    });
  }

  void embed(int row) const {
    const uint16_t* from = m.embedding + (int64_t)batch.tokens[row] * m.hidden;
    float* to = x + (int64_t)row * m.hidden;
    for (int i = 0; i < m.hidden; i += 16) f_store(to + i, f_mul(f_load_bf16(from + i), f_set(m.embedding_scale)));
    if (m.embedding_norm) rms_norm(to, m.embedding_norm, m.hidden, m.eps, to);
  }

  // Where a row's token stands: its item is the last that begins at or before it.
  int item_of(int row) const { return b.row_items[row]; }
  // The blocks of an item that a layer's cache has.
  const int32_t* table_of(int l, int item) const {
    return batch.tables + batch.table_starts[batch.layer_groups[l] * batch.num_items + item];
  }
  int position_of(int row) const {
    int item = item_of(row);
    return batch.items[item].start + row - b.item_rows[item];
  }

  void angles(int row) const {
    for (int kind = 0; kind < m.num_ropes; kind++) {
      const NbRope& rope = m.ropes[kind];
      int half = rope.dim / 2;
      bool is_long = rope.long_inv_freq && batch.items[item_of(row)].is_long;
      const float* inv_freq = is_long ? rope.long_inv_freq : rope.inv_freq;
      float* to = b.angles[kind] + (int64_t)row * rope.dim;
      for (int i = 0; i < half; i++) {
        float angle = (float)position_of(row) * inv_freq[i];
        to[i] = cosf(angle) * rope.factor;
        to[half + i] = sinf(angle) * rope.factor;
      }
    }
  }

  template <class Attention> static float query_scale(const Attention& a, int position) {
    if (!a.query_length) return a.scale;
    return a.scale * (1.0f + a.query_beta * log1pf((float)(position / a.query_length)));
  }

  // Norm, rotate and store a row's queries (bfloat16, [kv_heads][tokens][heads of one][head_dim], scaled), keys and
  // values.
  void rotate_and_store(Worker& worker, int row, int l, const NbAttention& a, const Cache& to) const {
    int dim = a.head_dim, shared = a.num_heads / a.num_kv_heads, all = a.num_heads * dim;
    int of_head = a.output_gate == NB_GATE_OF_QUERIES ? 2 * dim : dim;
    float *qkv = b.qkv + (int64_t)row * nibble::qkv_width(a), *keys = qkv + a.num_heads * of_head;
    const NbRope& rope = m.ropes[a.rope];
    const float *cosines = b.angles[a.rope] + (int64_t)row * rope.dim, *sines = cosines + rope.dim / 2;
    int position = position_of(row), block = table_of(l, item_of(row))[position / m.block_size];
    bool norm_heads = a.q_norm && !a.qk_norm_all;
    if (a.q_norm && a.qk_norm_all) {
      rms_norm(qkv, a.q_norm, all, m.eps, qkv);
      rms_norm(keys, a.k_norm, a.num_kv_heads * dim, m.eps, keys);
    }
    F32 scale = f_set(query_scale(a, position));
    for (int h = 0; h < a.num_heads; h++) {
      float* q = qkv + h * of_head;
      if (norm_heads) rms_norm(q, a.q_norm, dim, m.eps, q);
      rotate(q, rope, cosines, sines);
      uint16_t* out = b.queries + (((int64_t)(h / shared) * batch.num_tokens + row) * shared + h % shared) * dim;
      for (int d = 0; d < dim; d += 16) f_store_bf16(out + d, f_mul(f_load(q + d), scale));
    }
    for (int h = 0; h < (a.reads_only ? 0 : a.num_kv_heads); h++) {
      float *k = keys + h * dim, *v = k + a.num_kv_heads * dim;
      if (a.keys_are_values) v = (float*)memcpy(worker.scratch, k, sizeof(float) * dim);
      if (a.v_norm) rms_norm(v, a.v_norm, dim, m.eps, v);
      if (norm_heads) rms_norm(k, a.k_norm, dim, m.eps, k);
      rotate(k, rope, cosines, sines);
      write_cache(to, block, position % m.block_size, h, k, v);
    }
  }

  // One query tile: tokens [unit.first, unit.first + unit.count) of an item, one kv head.
  void attend_unit(Worker& worker, const nibble::Unit& unit, int head, int l, const NbAttention& a, const Cache& from) const {
    int dim = a.head_dim, shared = a.num_heads / a.num_kv_heads;
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
      s.last[r] = batch.last_seen ? batch.last_seen[row + r / shared] : position;
      s.first[r] = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
      s.top[r] = a.sinks ? a.sinks[head * shared + r % shared] : -1e30f;
      s.mass[r] = a.sinks ? 1.0f : 0.0f;
    }
    memset(s.out, 0, sizeof(float) * rows * dim);
    const uint16_t* q = b.queries + ((int64_t)head * batch.num_tokens + row) * shared * dim;
    attend({q, rows, s.first, s.last, s.out, s.top, s.mass, s.scores, s.weights, a.soft_cap}, from,
           head, table_of(l, unit.item), s.unpacked);
    for (int r = 0; r < rows; r++)
      memcpy(b.attended + (int64_t)(row + r / shared) * a.num_heads * dim + (head * shared + r % shared) * dim, s.out + r * dim,
             sizeof(float) * dim);
  }

  void gate_up(Worker& worker, const NbGatedMlp& mlp) const {
    int tiles = tiles_of(mlp.gate_up.linears[0]);
    Grid grid(batch.num_tokens, tiles, worker.threads);
    nibble::parallel(worker, grid.chunks(), [&](int chunk) {
      int row = chunk / grid.tile_blocks * kMaxRows, tile = chunk % grid.tile_blocks * grid.tiles;
      gated_product(worker, mlp, inputs, row, min_int(kMaxRows, batch.num_tokens - row), tile,
                    min_int(tile + grid.tiles, tiles), b.inner + (int64_t)row * mlp.intermediate + tile * 16,
                    mlp.intermediate);
    });
  }

  // The product that is added to x: at once, or first into y where it is normed before.
  void add_product(Worker& worker, const NbLinearGroup& group, const float* norm) const {
    products(worker, group, norm ? b.y : x, m.hidden, !norm);
  }

  void attention(Worker& worker, int l, const NbAttention& a, const Cache& kv, const float* after) const {
    products(worker, a.qkv, b.qkv, nibble::qkv_width(a), false);
    for_rows(worker, batch.num_tokens, [&](int row) { rotate_and_store(worker, row, l, a, kv); });
    const nibble::Units& units = b.units[nibble::unit_tokens(a)];
    nibble::parallel(worker, units.count * a.num_kv_heads, [&](int chunk) {
      int unit = units.count - 1 - chunk / a.num_kv_heads;  // long ones first
      attend_unit(worker, units.at[unit], chunk % a.num_kv_heads, l, a, kv);
    });
    int all = a.num_heads * a.head_dim;
    for_rows(worker, batch.num_tokens, [&](int row) {
      float* mixed = b.attended + (int64_t)row * all;
      const float* qkv = b.qkv + (int64_t)row * nibble::qkv_width(a);
      if (a.output_gate) gate_heads(a, qkv, mixed);
      if (a.head_gate) scale_heads(a, qkv + nibble::qkv_width(a) - a.num_heads, mixed);
      prepare_all(a.o, inputs, row, mixed, (float*)worker.scratch);
    });
    add_product(worker, a.o, after);
  }

  // What the heads of a row give, times sigmoid of their gates.
  static void gate_heads(const NbAttention& a, const float* qkv, float* mixed) {
    bool last = a.output_gate == NB_GATE_LAST;
    const float* gates = qkv + (last ? nibble::last_gates(a) : a.head_dim);
    for (int h = 0; h < a.num_heads; h++, gates += last ? a.head_dim : 2 * a.head_dim)
      for (int d = 0; d < a.head_dim; d += 16) {
        float* place = mixed + h * a.head_dim + d;
        f_store(place, f_mul(f_load(place), sigmoid(f_load(gates + d))));
      }
  }

  // What the heads of a row give, times sigmoid of a number for each.
  static void scale_heads(const NbAttention& a, const float* gates, float* mixed) {
    for (int h = 0; h < a.num_heads; h++)
      for (int d = 0; d < a.head_dim; d += 16) {
        float* place = mixed + h * a.head_dim + d;
        f_store(place, f_mul(f_load(place), f_set(sigmoid_of(gates[h]))));
      }
  }

  // The first row of an item in b.qkv, and what its slot has of a layer's states, whose size is that of one of them.
  const float* first_row(const Convolution& conv, int item) const {
    return b.qkv + (int64_t)b.item_rows[item] * conv.width;
  }
  const float* state_before(const float* states, int64_t size, int item) const {
    int slot = batch.item_states[item].read;
    return slot < 0 ? nullptr : states + slot * size;
  }

  // Some columns of one head's matrix through all tokens of an item, to its slot, and to snapshots on the way.
  void carry(const DeltaNet& net, int item, int head, int column) const {
    const NbDeltaNet& d = net.d;
    const NbItemState& where = batch.item_states[item];
    int columns = min_int(kColumns, d.value_dim - column), row = b.item_rows[item];
    auto copy = [&](int from, int to) {
      for (int i = 0; i < d.key_dim; i++) {
        float* place = net.matrix(to, head) + (int64_t)i * d.value_dim + column;
        if (from < 0) memset(place, 0, sizeof(float) * columns);
        else memcpy(place, net.matrix(from, head) + (int64_t)i * d.value_dim + column, sizeof(float) * columns);
      }
    };
    if (where.read != where.write) copy(where.read, where.write);
    float* state = net.matrix(where.write, head) + column;
    const int32_t *snapshot = batch.snapshots + 2 * where.snapshot, *last = snapshot + 2 * where.num_snapshots;
    int key = head / (d.value_heads / d.key_heads) * d.key_dim;
    for (int t = 0; t < batch.items[item].count; t++, row++) {
      const float *qkv = b.convolved + (int64_t)row * net.channels(), *q = qkv + key, *k = q + net.keys();
      const float* v = qkv + 2 * net.keys() + head * d.value_dim + column;
      const float* gate = b.qkv + (int64_t)row * net.width() + net.channels() + net.values() + head;
      float beta = gate[0], decay = gate[d.value_heads];
      float* out = b.attended + (int64_t)row * net.values() + head * d.value_dim + column;
      if (columns == kColumns) delta_step<kColumns / 16>(d, state, q, k, v, decay, beta, out);
      else
        for (int c = 0; c < columns; c += 16) delta_step<1>(d, state + c, q, k, v + c, decay, beta, out + c);
      for (; snapshot != last && snapshot[0] == t + 1; snapshot += 2) copy(where.write, snapshot[1]);
    }
  }

  // The inputs that an item leaves to its slot, and to snapshots. first: its first row.
  void leave_inputs(const Convolution& conv, const float* first, float* states, int64_t size, int item) const {
    const NbItemState& where = batch.item_states[item];
    const float* before = state_before(states, size, item);
    for (int i = 0; i < where.num_snapshots; i++) {
      const int32_t* snapshot = batch.snapshots + 2 * (where.snapshot + i);
      conv.leave(first, snapshot[0], before, states + snapshot[1] * size);
    }
    conv.leave(first, batch.items[item].count, before, states + where.write * size);
  }

  void delta_net(Worker& worker, const DeltaNet& net, const float* after) const {
    Convolution conv = net.convolution();
    products(worker, net.d.in, b.qkv, net.width(), false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      int item = item_of(row);
      convolve(net, first_row(conv, item), row - b.item_rows[item], state_before(net.states, net.state_size(), item),
               b.convolved + (int64_t)row * net.channels());
      gates(net, b.qkv + (int64_t)row * net.width());
    });
    int heads = net.d.value_heads * net.blocks();
    nibble::parallel(worker, batch.num_items * heads, [&](int chunk) {
      int item = batch.num_items - 1 - chunk / heads;  // long ones first
      if (chunk % heads == 0) leave_inputs(conv, first_row(conv, item), net.states, net.state_size(), item);
      carry(net, item, chunk % heads / net.blocks(), chunk % net.blocks() * kColumns);
    });
    for_rows(worker, batch.num_tokens, [&](int row) {
      float* mixed = b.attended + (int64_t)row * net.values();
      gated_norm(net, mixed, b.qkv + (int64_t)row * net.width() + net.channels(), m.eps);
      prepare_all(net.d.out, inputs, row, mixed, (float*)worker.scratch);
    });
    add_product(worker, net.d.out, after);
  }

  // One head's matrix through all tokens of an item, to its slot, and to snapshots on the way.
  void carry(const Mamba2& net, int item, int head) const {
    const NbItemState& where = batch.item_states[item];
    size_t bytes = sizeof(float) * net.m.state_dim * net.m.head_dim;
    float* state = net.matrix(where.write, head);
    if (where.read < 0) memset(state, 0, bytes);
    else if (where.read != where.write) memcpy(state, net.matrix(where.read, head), bytes);
    const int32_t *snapshot = batch.snapshots + 2 * where.snapshot, *last = snapshot + 2 * where.num_snapshots;
    int first = b.item_rows[item], count = batch.items[item].count;
    for (int t = 0; t < count;) {
      int end = snapshot != last ? min_int(snapshot[0], count) : count;
      const float* row = b.convolved + (int64_t)(first + t) * net.convolved_width();
      float* out = b.attended + (int64_t)(first + t) * net.values() + head * net.m.head_dim;
      bool several = t + kSteps <= end;
      if (several) mamba_head<kSteps, kStepLanes>(net, state, row, head, out);
      else mamba_head<1, kOneLanes>(net, state, row, head, out);
      t += several ? kSteps : 1;
      for (; snapshot != last && snapshot[0] == t; snapshot += 2) memcpy(net.matrix(snapshot[1], head), state, bytes);
    }
  }

  void mamba2(Worker& worker, const Mamba2& net, const float* after) const {
    Convolution conv = net.convolution();
    int values = net.values(), heads = net.m.heads;
    products(worker, net.m.in, b.qkv, net.width(), false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      int item = item_of(row);
      const float* dt = b.qkv + (int64_t)row * net.width() + values + net.channels();
      convolve(net, first_row(conv, item) + values, row - b.item_rows[item],
               state_before(net.states, net.state_size(), item), dt, b.convolved + (int64_t)row * net.convolved_width());
    });
    nibble::parallel(worker, batch.num_items * heads, [&](int chunk) {
      int item = batch.num_items - 1 - chunk / heads;  // long ones first
      if (chunk % heads == 0) leave_inputs(conv, first_row(conv, item) + values, net.states, net.state_size(), item);
      carry(net, item, chunk % heads);
    });
    for_rows(worker, batch.num_tokens, [&](int row) {
      float* mixed = b.attended + (int64_t)row * values;
      gated_norm(net, mixed, b.qkv + (int64_t)row * net.width(), m.eps);
      prepare_all(net.m.out, inputs, row, mixed, (float*)worker.scratch);
    });
    add_product(worker, net.m.out, after);
  }

  void short_conv(Worker& worker, const NbShortConv& c, float* states, const float* after) const {
    int n = c.channels;
    Convolution conv{c.taps, n, 3 * n, c.filters};
    products(worker, c.in, b.qkv, 3 * n, false);
    for_rows(worker, batch.num_tokens, [&](int row) {  // x becomes B * x
      float *before = b.qkv + (int64_t)row * 3 * n, *x = before + 2 * n;
      for (int i = 0; i < n; i += 16) f_store(x + i, f_mul(f_load(before + i), f_load(x + i)));
    });
    for_rows(worker, batch.num_tokens, [&](int row) {
      int item = item_of(row);
      const float *first = first_row(conv, item) + 2 * n, *state = state_before(states, conv.state_size(), item);
      const float* gate = b.qkv + (int64_t)row * 3 * n + n;
      float* mixed = (float*)worker.scratch;
      for (int i = 0; i < n; i += 16) {
        F32 y = conv.at(first, row - b.item_rows[item], state, i);
        if (c.bias) y = f_add(y, f_load(c.bias + i));
        f_store(mixed + i, f_mul(f_load(gate + i), y));
      }
      prepare_all(c.out, inputs, row, mixed, mixed + n);
    });
    nibble::parallel(worker, batch.num_items, [&](int item) {
      leave_inputs(conv, first_row(conv, item) + 2 * n, states, conv.state_size(), item);
    });
    add_product(worker, c.out, after);
  }

  void gated_mlp(Worker& worker, const NbGatedMlp& mlp, const float* after) const {
    if (mlp.sparse) {
      sparse_gate_up(worker, mlp);
    } else {
      gate_up(worker, mlp);
      prepare_rows(worker, mlp.down, b.inner, mlp.intermediate);
    }
    add_product(worker, mlp.down, after);
  }

  // Where all gates of a row decide which of them count.
  void sparse_gate_up(Worker& worker, const NbGatedMlp& mlp) const {
    int width = mlp.intermediate;
    products(worker, mlp.gate_up, b.inner, 2 * width, false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      float *gates = b.inner + (int64_t)row * 2 * width, *ups = gates + width;
      above_cutoff(gates, width, mlp.deviations);
      for (int i = 0; i < width; i += 16)
        f_store(gates + i, f_mul(activate(f_load(gates + i), mlp.activation), f_load(ups + i)));
      prepare_all(mlp.down, inputs, row, gates, (float*)worker.scratch);
    });
  }

  void experts(Worker& worker, const NbExperts& e, const float* after) const {
    ExpertStep{e, b, batch.num_tokens, m.hidden}.run(worker, after ? b.y : x, after != nullptr);
  }

  // norm(mlp) + norm(experts) into y, which is normed once more when it is added.
  void mlp_beside_experts(Worker& worker, const NbLayer& layer) const {
    gated_mlp(worker, *layer.mlp, layer.after_dense);
    float* routed = b.experts.h;  // which experts have read by then
    ExpertStep{*layer.experts, b, batch.num_tokens, m.hidden}.run(worker, routed, true);
    for_rows(worker, batch.num_tokens, [&](int row) {
      float *y = b.y + (int64_t)row * m.hidden, *more = routed + (int64_t)row * m.hidden;
      rms_norm(y, layer.after_dense, m.hidden, m.eps, y);
      rms_norm(more, layer.after_experts, m.hidden, m.eps, more);
      for (int i = 0; i < m.hidden; i += 16) f_store(y + i, f_add(f_load(y + i), f_load(more + i)));
    });
  }

  float* streams_of(int row) const { return b.streams + (int64_t)row * m.alt_up->streams * m.hidden; }

  // The streams of the tokens, all but the first still as long as their projections. Embeds the tokens.
  void start_streams(Worker& worker) const {
    const NbAltUp& a = *m.alt_up;
    for_rows(worker, batch.num_tokens, [&](int row) {
      if (!m.per_layer_inputs) embed(row);  // else they are
      const float* hidden = x + (int64_t)row * m.hidden;
      memcpy(streams_of(row), hidden, sizeof(float) * m.hidden);
      prepare_all(a.into, inputs, row, hidden, (float*)worker.scratch);
    });
    products(worker, a.into, b.streams + m.hidden, a.streams * m.hidden, false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      float* first = streams_of(row);
      for (int s = 1; s < a.streams; s++) {
        float* stream = first + (int64_t)s * m.hidden;
        F32 factor = f_set(as_long(stream, first, m.hidden));
        for (int i = 0; i < m.hidden; i += 16) f_store(stream + i, f_mul(f_load(stream + i), factor));
      }
    });
  }

  // The mean of the first stream and of the others' projections back, made as long, into x.
  void end_streams(Worker& worker) const {
    const NbAltUp& a = *m.alt_up;
    for (int s = 0; s < a.streams - 1; s++) {
      for_rows(worker, batch.num_tokens, [&](int row) {
        add_stream(row, s);
        prepare_all(a.back[s], inputs, row, streams_of(row) + (int64_t)(s + 1) * m.hidden, (float*)worker.scratch);
      });
      products(worker, a.back[s], b.y, m.hidden, false);
    }
    for_rows(worker, batch.num_tokens, [&](int row) {
      add_stream(row, a.streams - 1);
      float* hidden = x + (int64_t)row * m.hidden;
      F32 share = f_set(1.0f / a.streams);
      for (int i = 0; i < m.hidden; i += 16) f_store(hidden + i, f_mul(f_load(hidden + i), share));
    });
  }

  // x of a row becomes its first stream, and then more: what the last product gave of another, made as long.
  void add_stream(int row, int stream) const {
    const float *first = streams_of(row), *y = b.y + (int64_t)row * m.hidden;
    float* hidden = x + (int64_t)row * m.hidden;
    if (!stream) {
      memcpy(hidden, first, sizeof(float) * m.hidden);
      return;
    }
    F32 factor = f_set(as_long(y, first, m.hidden));
    for (int i = 0; i < m.hidden; i += 16) f_store(hidden + i, f_fma(f_load(y + i), factor, f_load(hidden + i)));
  }

  // Before the mixer: x += h + norm(right(left(h))), h = norm(x), which is what the mixer then reads.
  void laurel(Worker& worker, const NbLayer& layer) const {
    const NbLaurel& l = *layer.laurel;
    products(worker, l.left, b.inner, l.rank, false);
    prepare_rows(worker, l.right, b.inner, l.rank);
    products(worker, l.right, b.y, m.hidden, false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      float *hidden = x + (int64_t)row * m.hidden, *normed = (float*)worker.scratch;
      const float* h = b.normed + (int64_t)row * m.hidden;
      rms_norm(b.y + (int64_t)row * m.hidden, l.norm, m.hidden, m.eps, normed);
      for (int i = 0; i < m.hidden; i += 16)
        f_store(hidden + i, f_add(f_load(hidden + i), f_add(f_load(h + i), f_load(normed + i))));
      prepare_all(nibble::mixer_in(layer), inputs, row, h, normed);
    });
  }

  void norm_for_laurel(Worker& worker, int row, const NbLayer& layer) const {
    const float* from = x + (int64_t)row * m.hidden;
    float* h = b.normed + (int64_t)row * m.hidden;
    if (layer.before_mixer) rms_norm(from, layer.before_mixer, m.hidden, m.eps, h);
    else memcpy(h, from, sizeof(float) * m.hidden);
    prepare_all(layer.laurel->left, inputs, row, h, (float*)worker.scratch);
  }

  // What is left to do with a row when a layer's mixer has been computed.
  void add_mixed(Worker& worker, int row, const NbLayer& layer) const {
    add_normed(worker, row, layer.after_mixer);
    float* hidden = x + (int64_t)row * m.hidden;
    for (int i = 0; layer.laurel && i < m.hidden; i += 16)
      f_store(hidden + i, f_mul(f_load(hidden + i), f_set(0.70710678f)));
  }

  // The same when its last product has been computed that is not of a per-layer input. With streams, x becomes what
  // that reads.
  void settle(Worker& worker, int row, const NbLayer& layer) const {
    if (nibble::has_feed_forward(layer)) add_normed(worker, row, layer.after_mlp);
    else add_mixed(worker, row, layer);
    if (!layer.alt_up) return;
    float *streams = streams_of(row), *hidden = x + (int64_t)row * m.hidden;
    correct_streams(*layer.alt_up, *m.alt_up, m.hidden, m.eps, hidden, streams);
    const float *active = streams + (int64_t)m.alt_up->active * m.hidden, *scale = layer.alt_up->scale;
    for (int i = 0; i < m.hidden; i += 16)
      f_store(hidden + i, scale ? f_mul(f_load(active + i), f_load(scale + i)) : f_load(active + i));
  }

  // What a layer is told once more, added to x or to all streams but the first.
  void add_told(Worker& worker, int row, const NbLayer& layer) const {
    const float* norm = layer.per_layer_input->norm;
    if (!layer.alt_up) return add_normed(worker, row, norm);
    float* told = (float*)worker.scratch;
    rms_norm(b.y + (int64_t)row * m.hidden, norm, m.hidden, m.eps, told);
    for (int s = 1; s < m.alt_up->streams; s++) {
      float* stream = streams_of(row) + (int64_t)s * m.hidden;
      for (int i = 0; i < m.hidden; i += 16) f_store(stream + i, f_add(f_load(stream + i), f_load(told + i)));
    }
  }

  // What all layers are told of the tokens once more, into b.per_layer. Embeds the tokens.
  void per_layer_inputs(Worker& worker, const NbPerLayerInputs& p) const {
    int width = p.width, all = m.num_layers * width;
    for_rows(worker, batch.num_tokens, [&](int row) {
      embed(row);
      norm_and_prepare(worker, row, nullptr, p.projection);
    });
    products(worker, p.projection, b.per_layer, all, false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      F32 scale = f_set(p.projection_scale), own = f_set(p.table_scale), half = f_set(0.70710678f);
      int token = batch.tokens[row] < p.vocab ? batch.tokens[row] : 0;
      for (int l = 0; l < m.num_layers; l++) {
        float* to = b.per_layer + (int64_t)row * all + l * width;
        const uint16_t* from = p.table + (int64_t)token * all + l * width;
        for (int i = 0; i < width; i += 16) f_store(to + i, f_mul(f_load(to + i), scale));
        rms_norm(to, p.norm, width, m.eps, to);
        for (int i = 0; i < width; i += 16)
          f_store(to + i, f_mul(f_fma(f_load_bf16(from + i), own, f_load(to + i)), half));
      }
    });
  }

  void per_layer_input(Worker& worker, int l, const NbPerLayerInput& input) const {
    int width = m.per_layer_inputs->width;
    for_rows(worker, batch.num_tokens, [&](int row) {
      settle(worker, row, m.layers[l]);
      norm_and_prepare(worker, row, nullptr, input.gate);
    });
    products(worker, input.gate, b.inner, width, false);
    for_rows(worker, batch.num_tokens, [&](int row) {
      float* gate = b.inner + (int64_t)row * width;
      const float* given = b.per_layer + ((int64_t)row * m.num_layers + l) * width;
      for (int i = 0; i < width; i += 16)
        f_store(gate + i, f_mul(activate(f_load(gate + i), m.per_layer_inputs->activation), f_load(given + i)));
      prepare_all(input.projection, inputs, row, gate, (float*)worker.scratch);
    });
    products(worker, input.projection, b.y, m.hidden, false);
  }

  // What is left to do with a row when a layer's last product has been computed.
  void leave(Worker& worker, int row, const NbLayer& layer) const {
    if (layer.per_layer_input) add_told(worker, row, layer);
    else settle(worker, row, layer);
    float* hidden = layer.alt_up ? streams_of(row) : x + (int64_t)row * m.hidden;
    int numbers = layer.alt_up ? m.alt_up->streams * m.hidden : m.hidden;
    for (int i = 0; layer.scalar != 1.0f && i < numbers; i++) hidden[i] *= layer.scalar;
  }

  // Before a layer's first product.
  void enter(Worker& worker, int row, int l) const {
    if (l == 0) {
      if (m.embedding && !m.per_layer_inputs && !m.alt_up) embed(row);
      angles(row);
    } else {
      leave(worker, row, m.layers[l - 1]);
    }
    if (!m.alt_up) return;
    float* streams = streams_of(row);
    predict_streams(*m.layers[l].alt_up, *m.alt_up, m.hidden, m.eps, streams);
    memcpy(x + (int64_t)row * m.hidden, streams + (int64_t)m.alt_up->active * m.hidden, sizeof(float) * m.hidden);
  }

  void norm_last(int row) const {
    float* hidden = x + (int64_t)row * m.hidden;
    if (m.norm) rms_norm(hidden, m.norm, m.hidden, m.eps, hidden);
  }

  void norm_for_feed_forward(Worker& worker, int row, const NbLayer& layer) const {
    if (layer.mlp) norm_and_prepare(worker, row, layer.before_mlp, layer.mlp->gate_up);
    if (layer.experts) norm_for_experts(row, layer.mlp ? layer.before_experts : layer.before_mlp);
  }

  // states: of the layer, if it has any. Returns those of the next.
  float* mixer(Worker& worker, int l, float* states) const {
    const NbLayer& layer = m.layers[l];
    uint8_t* cache = batch.cache + batch.cache_offsets[l];
    if (layer.attention) {
      const NbAttention& a = *layer.attention;
      attention(worker, l, a, {cache, m.block_size, a.head_dim, a.num_kv_heads, batch.cache_int8 != 0}, layer.after_mixer);
      return states;
    }
    if (layer.latent_attention) {
      const NbLatentAttention& a = *layer.latent_attention;
      LatentCache latents{cache, m.block_size, a.kv_rank, a.kv_rank + a.rope_dim, batch.cache_int8 != 0};
      LatentStep<Step>{*this, l, a, latents}.run(worker, layer.after_mixer);
      return states;
    }
    if (layer.delta_net) {
      DeltaNet net{*layer.delta_net, states};
      delta_net(worker, net, layer.after_mixer);
      return states + batch.num_slots * net.state_size();
    }
    if (layer.mamba2) {
      Mamba2 net{*layer.mamba2, states};
      mamba2(worker, net, layer.after_mixer);
      return states + batch.num_slots * net.state_size();
    }
    const NbShortConv& conv = *layer.short_conv;
    short_conv(worker, conv, states, layer.after_mixer);
    return states + batch.num_slots * (conv.taps - 1) * conv.channels;
  }

  void run(Worker& worker) const {
    float* states = batch.states;
    if (m.per_layer_inputs) per_layer_inputs(worker, *m.per_layer_inputs);
    if (m.alt_up) start_streams(worker);
    for (int l = 0; l < m.num_layers; l++) {
      const NbLayer& layer = m.layers[l];
      bool mixes = nibble::has_mixer(layer), feeds = nibble::has_feed_forward(layer);
      for_rows(worker, batch.num_tokens, [&](int row) {
        enter(worker, row, l);
        if (layer.laurel) norm_for_laurel(worker, row, layer);
        else if (mixes) norm_and_prepare(worker, row, layer.before_mixer, nibble::mixer_in(layer));
        else if (feeds) norm_for_feed_forward(worker, row, layer);
      });
      if (layer.laurel) laurel(worker, layer);
      if (mixes) states = mixer(worker, l, states);
      if (mixes && feeds)
        for_rows(worker, batch.num_tokens, [&](int row) {
          add_mixed(worker, row, layer);
          norm_for_feed_forward(worker, row, layer);
        });
      if (layer.mlp && layer.experts) mlp_beside_experts(worker, layer);
      else if (layer.mlp) gated_mlp(worker, *layer.mlp, layer.after_mlp);
      else if (layer.experts) experts(worker, *layer.experts, layer.after_mlp);
      if (layer.per_layer_input) per_layer_input(worker, l, *layer.per_layer_input);
    }
    for_rows(worker, batch.num_tokens, [&](int row) {
      leave(worker, row, m.layers[m.num_layers - 1]);
      if (!m.alt_up) norm_last(row);
    });
    if (!m.alt_up) return;
    end_streams(worker);
    for_rows(worker, batch.num_tokens, [&](int row) { norm_last(row); });
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

// A mixture of experts: which tokens go where, and the products of each expert with its own tokens.
//
//   h [tokens, hidden], normed -> scores -> the experts of each token and their weights
//     -> pairs of a token and an expert, by expert, then by token (the shared expert: one more, which all tokens go to)
//     -> gate_up -> act(gate) * up -> down -> times its weight, added to the token's row
//
// Experts of a latent space read a projection of h, and the sum of what they give is projected back.
//
// Only experts that some token chose are read, each once for all of its tokens. A row adds up what its experts give in
// the order of their numbers, so it never depends on which other rows are computed with it.
#pragma once
#include "glue.h"
#include "isa.h"

namespace NB_ISA {

using nibble::ExpertBuffers;
using nibble::ExpertUnit;
using nibble::StepBuffers;

static_assert(nibble::kExpertRows == kMaxRows, "a unit is what meets one unpacked piece");

constexpr int kRouted = 4;  // experts that are scored at once

// out[i] = h . rows[i] for N rows of the router.
template <int N> inline void score(const float* h, const float* rows, int hidden, float* out) {
  F32 sums[N];
  for (int n = 0; n < N; n++) sums[n] = f_zero();
  for (int i = 0; i < hidden; i += 16)
    for (int n = 0; n < N; n++) sums[n] = f_fma(f_load(h + i), f_load(rows + (int64_t)n * hidden + i), sums[n]);
  for (int n = 0; n < N; n++) out[n] = f_sum(sums[n]);
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

// The largest of those that are left, the first where several are; taken.
inline int take_best(const float* ranks, int count, char* taken) {
  int best = -1;
  for (int i = 0; i < count; i++)
    if (!taken[i] && (best < 0 || ranks[i] > ranks[best])) best = i;
  taken[best] = 1;
  return best;
}

// Takes every expert outside the best groups: a group is as good as its group_rank best experts together.
inline void leave_groups(const NbExperts& e, const float* ranks, char* taken, float* totals) {
  int size = e.num_experts / e.groups;
  char* kept = taken + e.num_experts;
  memset(kept, 0, e.groups);
  for (int g = 0; g < e.groups; g++) {
    totals[g] = 0.0f;
    for (int i = 0; i < e.group_rank; i++) totals[g] += ranks[g * size + take_best(ranks + g * size, size, taken + g * size)];
  }
  for (int i = 0; i < e.best_groups; i++) take_best(totals, e.groups, kept);
  for (int i = 0; i < e.num_experts; i++) taken[i] = !kept[i / size];
}

// From the router's products [num_experts], which become scores, to the experts of a token and their weights [top_k].
inline void choose(const NbExperts& e, float* scores, int32_t* chosen, float* weights, char* scratch) {
  int count = e.num_experts;
  float top = scores[0], total = 0.0f;
  for (int i = 1; i < count; i++) top = scores[i] > top ? scores[i] : top;
  for (int i = 0; i < count; i++) {
    scores[i] = e.scoring == NB_SIGMOID ? sigmoid_of(scores[i]) : expf(scores[i] - top);
    total += scores[i];
  }
  float *ranks = (float*)scratch, *totals = ranks + count;
  char* taken = (char*)(totals + count);
  for (int i = 0; i < count; i++) {
    if (e.scoring == NB_SOFTMAX) scores[i] /= total;
    ranks[i] = e.correction_bias ? scores[i] + e.correction_bias[i] : scores[i];
  }
  memset(taken, 0, count);
  if (e.groups) leave_groups(e, ranks, taken, totals);
  float sum = 1e-20f;
  for (int k = 0; k < e.top_k; k++) {
    chosen[k] = take_best(ranks, count, taken);
    sum += scores[chosen[k]];
  }
  for (int k = 0; k < e.top_k; k++) {
    weights[k] = scores[chosen[k]] * e.routed_scale / (e.norm_weights ? sum : 1.0f);
    if (e.scales) weights[k] *= e.scales[chosen[k]];
  }
}

struct ExpertStep {
  const NbExperts& e;
  const StepBuffers& b;
  int rows, hidden;

  const ExpertBuffers& at() const { return b.experts; }
  const NbGatedMlp& mlp(int expert) const { return expert < e.num_experts ? e.experts[expert] : *e.shared; }
  const float* row(int token) const { return at().h + (int64_t)token * hidden; }
  int pairs() const { return rows * nibble::paths(e); }

  // Where the inputs of an expert's pairs are prepared, the first at row 0.
  void inputs_of(int expert, InputBuffer* inputs) const {
    int64_t first = at().firsts[expert];
    for (int i = 0; i < NB_MAX_INPUTS; i++)
      inputs[i] = {b.inputs[i] + first * b.row_bytes[i], b.scales[i] + first * b.row_groups[i],
                   b.sums[i] + first * b.row_groups[i]};
  }

  void score_all(Worker& worker) const {
    int blocks = (e.num_experts + kRouted - 1) / kRouted;
    nibble::parallel(worker, rows * blocks, [&](int chunk) {
      int token = chunk / blocks, first = chunk % blocks * kRouted;
      const float* weights = e.router + (int64_t)first * hidden;
      float* out = at().scores + (int64_t)token * e.num_experts + first;
      if (first + kRouted <= e.num_experts) score<kRouted>(row(token), weights, hidden, out);
      else
        for (int i = 0; first + i < e.num_experts; i++) score<1>(row(token), weights + (int64_t)i * hidden, hidden, out + i);
      for (int i = first; e.router_bias && i < min_int(first + kRouted, e.num_experts); i++) out[i - first] += e.router_bias[i];
    });
  }

  void choose_all(Worker& worker) const {
    for_rows(worker, rows, [&](int token) {
      float* weights = at().weights + (int64_t)token * (e.top_k + 1);
      choose(e, at().scores + (int64_t)token * e.num_experts, at().chosen + (int64_t)token * e.top_k, weights,
             worker.scratch);
      float gate = 0.0f;
      if (e.shared_gate) score<1>(row(token), e.shared_gate, hidden, &gate);
      weights[e.top_k] = e.shared_gate ? sigmoid_of(gate) : 1.0f;
    });
  }

  void sort_pairs(int32_t* next) const {
    const ExpertBuffers& t = at();
    int paths = nibble::paths(e), all = e.num_experts + (e.shared ? 1 : 0);
    auto expert_of = [&](int pair) {
      return pair % paths < e.top_k ? t.chosen[pair / paths * e.top_k + pair % paths] : e.num_experts;
    };
    memset(t.firsts, 0, sizeof(int32_t) * (all + 1));
    for (int i = 0; i < pairs(); i++) t.firsts[expert_of(i) + 1]++;
    for (int i = 0; i < all; i++) t.firsts[i + 1] += t.firsts[i];
    memcpy(next, t.firsts, sizeof(int32_t) * all);
    for (int i = 0; i < pairs(); i++) {
      int expert = expert_of(i), place = next[expert]++;
      t.pair_tokens[place] = i / paths;
      t.pair_experts[place] = expert;
      t.pair_weights[place] = t.weights[i / paths * (e.top_k + 1) + i % paths];
    }
    int units = 0;
    for (int i = 0; i < all; i++)
      for (int first = 0, count = t.firsts[i + 1] - t.firsts[i]; first < count; first += kMaxRows)
        t.units[units++] = {i, first, min_int(kMaxRows, count - first)};
    *t.num_units = units;
  }

  // from(pair, space for a row): the row that a pair's product reads.
  template <class Row> void prepare_pairs(Worker& worker, NbLinearGroup NbGatedMlp::*group, Row from) const {
    for_rows(worker, pairs(), [&](int pair) {
      int expert = at().pair_experts[pair];
      InputBuffer inputs[NB_MAX_INPUTS];
      inputs_of(expert, inputs);
      float* space = (float*)worker.scratch;
      prepare_all(mlp(expert).*group, inputs, pair - at().firsts[expert], from(pair, space), space + hidden);
    });
  }

  float* inner(int pair) const { return b.inner + (int64_t)pair * nibble::inner_width(e); }

  // A thread may come to a phase when the others are layers ahead and the units are those of another layer: how many
  // chunks there are must not depend on what was chosen. So there are as many as could be; some have nothing to do.
  void gate_up(Worker& worker) const {
    const ExpertBuffers& t = at();
    int units = nibble::most_units(rows, e), tiles = nibble::inner_width(e) / 16;
    int size = units * tiles / (8 * worker.threads) / kTiles * kTiles;
    size = size < kTiles ? kTiles : size > 16 ? 16 : size;
    int blocks = (tiles + size - 1) / size;
    nibble::parallel(worker, units * blocks, [&](int chunk) {
      if (chunk / blocks >= *t.num_units) return;
      const ExpertUnit& unit = t.units[chunk / blocks];
      const NbGatedMlp& own = mlp(unit.expert);
      int tile = chunk % blocks * size, end = min_int(tile + size, tiles_of(own.gate_up.linears[0]));
      if (tile >= end) return;
      InputBuffer inputs[NB_MAX_INPUTS];
      inputs_of(unit.expert, inputs);
      gated_product(worker, own, inputs, unit.first, unit.rows, tile, end,
                    inner(t.firsts[unit.expert] + unit.first) + tile * 16, nibble::inner_width(e));
    });
  }

  // What some experts give, [first, end), each of width `width`. A chunk is some columns of all rows, so that each
  // row's sum has one order.
  void down(Worker& worker, int first, int end, int width, float* out, bool clear) const {
    const ExpertBuffers& t = at();
    Grid grid(kMaxRows, width / 16, worker.threads);
    nibble::parallel(worker, grid.chunks(), [&](int chunk) {
      int tile = chunk * grid.tiles, last = min_int(tile + grid.tiles, width / 16), columns = (last - tile) * 16;
      float *products = (float*)worker.scratch, *to = out + tile * 16;
      for (int i = 0; clear && i < rows; i++) memset(to + (int64_t)i * width, 0, sizeof(float) * columns);
      for (int u = 0; u < *t.num_units; u++) {
        const ExpertUnit& unit = t.units[u];
        if (unit.expert < first || unit.expert >= end) continue;
        const NbLinearGroup& group = mlp(unit.expert).down;
        InputBuffer inputs[NB_MAX_INPUTS];
        inputs_of(unit.expert, inputs);
        product<false>(group.linears[0], view(group.inputs[0], inputs[0]), unit.first, unit.rows, tile, last, products,
                       columns);
        for (int r = 0; r < unit.rows; r++) {
          int pair = t.firsts[unit.expert] + unit.first + r;
          F32 weight = f_set(t.pair_weights[pair]);
          float* sum = to + (int64_t)t.pair_tokens[pair] * width;
          for (int i = 0; i < columns; i += 16)
            f_store(sum + i, f_fma(f_load(products + r * columns + i), weight, f_load(sum + i)));
        }
      }
    });
  }

  // Rows from [tokens, width] through a linear of the latent space.
  template <bool Add>
  void project(Worker& worker, const NbLinearGroup& group, const float* from, int width, float* out, int stride) const {
    InputBuffer inputs[NB_MAX_INPUTS];
    Activations views[NB_MAX_INPUTS];
    for (int i = 0; i < group.num_inputs; i++) {
      inputs[i] = {b.inputs[i], b.scales[i], b.sums[i]};
      views[i] = view(group.inputs[i], inputs[i]);
    }
    for_rows(worker, rows, [&](int token) {
      prepare_all(group, inputs, token, from + (int64_t)token * width, (float*)worker.scratch);
    });
    run_group<Add>(worker, group, views, rows, out, stride);
  }

  const float* read_by(int pair) const {
    int token = at().pair_tokens[pair];
    return e.latent && at().pair_experts[pair] < e.num_experts ? at().latent + (int64_t)token * e.latent : row(token);
  }

  // Adds to out [rows, hidden], or fills it; h is in its place.
  void run(Worker& worker, float* out, bool clear) const {
    int all = e.num_experts + (e.shared ? 1 : 0);
    score_all(worker);
    choose_all(worker);
    nibble::parallel(worker, 1, [&](int) { sort_pairs((int32_t*)worker.scratch); });
    if (e.latent) project<false>(worker, e.into, at().h, hidden, at().latent, e.latent);
    prepare_pairs(worker, &NbGatedMlp::gate_up, [&](int pair, float* space) {
      const float* from = read_by(pair);
      if (!e.norm) return from;
      for (int i = 0; i < hidden; i += 16) f_store(space + i, f_mul(f_load(from + i), f_load(e.norm + i)));
      return (const float*)space;
    });
    gate_up(worker);
    prepare_pairs(worker, &NbGatedMlp::down, [&](int pair, float*) { return inner(pair); });
    down(worker, e.latent ? e.num_experts : 0, all, hidden, out, clear);
    if (!e.latent) return;
    down(worker, 0, e.num_experts, e.latent, at().latent, true);
    project<true>(worker, e.out_of, at().latent, e.latent, out, hidden);
  }
};

}  // namespace NB_ISA

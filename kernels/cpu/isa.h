// What the code of every instruction set offers, and what it is given: jobs with all memory already in place.
#pragma once
#include "abi.h"
#include "pool.h"

namespace nibble {

// Some tokens of one item, attended to together.
struct Unit {
  int32_t item, first, count;
};

constexpr int kExpertRows = 64;  // pairs of a unit of experts
constexpr int kQueryTile = 32;  // query rows (token, head) of a unit
constexpr int kLatentRows = 128;  // where heads see latents
constexpr int kPackedHeads = 16;  // which lie side by side there
constexpr int kSegment = 1024;    // positions whose sums are made together
constexpr size_t kPartials = size_t(16) << 20;  // numbers in the sums of segments that threads share, at most

// How the tokens of a step are cut up for attention.
struct Units {
  Unit* at;
  int32_t count;
};

// Some tokens of one expert: pairs first .. first + rows of those that chose it.
struct ExpertUnit {
  int32_t expert, first, rows;
};

// What the tokens of a step choose. A pair is a token and an expert; the shared expert comes after all others.
struct ExpertBuffers {
  float* h;               // [tokens, hidden] normed
  float* latent;          // [tokens, latent] of it, and what experts give
  float* scores;          // [tokens, num_experts]
  int32_t* chosen;        // [tokens, top_k]
  float* weights;         // [tokens, top_k + 1], the shared expert's last
  int32_t* firsts;        // [num_experts + 2] the first pair of each expert
  int32_t* pair_tokens;   // [pairs] by expert, then by token
  int32_t* pair_experts;
  float* pair_weights;
  ExpertUnit* units;
  int32_t* num_units;
};

struct StepBuffers {
  // Bytes and groups of a row of each input.
  size_t row_bytes[NB_MAX_INPUTS], row_groups[NB_MAX_INPUTS];
  char* inputs[NB_MAX_INPUTS];  // prepared activations, see InputBuffer
  float* scales[NB_MAX_INPUTS];
  int32_t* sums[NB_MAX_INPUTS];
  // Of the layer at hand, as wide as the widest.
  float* qkv;            // [tokens, heads + 2 kv_heads, head_dim], or what the linears of another mixer give
  float* convolved;      // [tokens, channels], and what else a mixer makes of a row
  uint16_t* queries;     // [kv_heads, tokens, heads of one, head_dim], or see latent_attention.h
  char* head_inputs;     // prepared activations of linears that are one a head: rows [heads, tokens]
  float* head_scales;
  int32_t* head_sums;
  float* partials;       // sums of segments, see latent_attention.h
  float* attended;       // [tokens, heads, head_dim]
  float* inner;          // [tokens or pairs, intermediate], and what a layer is told once more
  float* y;              // [tokens, hidden]: a product whose norm comes before the sum
  float* normed;         // [tokens, hidden]: what a mixer reads that has a way around it
  float* streams;        // [tokens, streams, hidden], see alt_up.h
  float* per_layer;      // [tokens, layers, width of their inputs]
  float* angles[NB_MAX_ROPES];  // [tokens, 2, rope dim / 2]: cosines, sines
  int32_t* row_items;    // [tokens] which item a row belongs to
  int32_t* item_rows;    // [items] its first row
  ExpertBuffers experts;
  Units units[kQueryTile + 1];  // by the most tokens that one has; those that some layer needs
};

struct StepJob {
  const NbModel* model;
  const NbBatch* batch;
  const StepBuffers* buffers;
  float* hidden;
};

struct LogitsJob {
  const NbModel* model;
  const StepBuffers* buffers;
  const float* hidden;
  int rows;
  float* logits;
};

struct LinearJob {
  const NbLinearGroup* group;
  const StepBuffers* buffers;
  const float* x;
  int rows;
  float* y;
};

struct Kernels {
  Program forward, logits, linear;
};

inline int qkv_width(const NbAttention& a) {
  int stored = a.reads_only ? 0 : a.keys_are_values ? 1 : 2;
  int vectors = (a.output_gate != NB_NO_GATE ? 2 : 1) * a.num_heads + stored * a.num_kv_heads;
  return vectors * a.head_dim + (a.head_gate ? a.num_heads : 0);
}

// Where the gates of all heads begin that come last.
inline int last_gates(const NbAttention& a) {
  return qkv_width(a) - a.num_heads * a.head_dim - (a.head_gate ? a.num_heads : 0);
}

inline int channels_of(const NbDeltaNet& d) { return 2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim; }

inline int width_of(const NbDeltaNet& d) { return channels_of(d) + d.value_heads * d.value_dim + 2 * d.value_heads; }

inline int width_of(const NbLatentAttention& a) {
  return (a.q_rank ? a.q_rank : a.num_heads * (a.nope_dim + a.rope_dim)) + a.kv_rank + a.rope_dim;
}

inline int packs_of(int heads) { return (heads + kPackedHeads - 1) / kPackedHeads; }

// Numbers in the packed queries of a token.
inline int packed_width(const NbLatentAttention& a) {
  return packs_of(a.num_heads) * kPackedHeads * (a.kv_rank + a.rope_dim);
}

inline int channels_of(const NbMamba2& m) { return m.heads * m.head_dim + 2 * m.groups * m.state_dim; }

inline int width_of(const NbMamba2& m) { return m.heads * m.head_dim + channels_of(m) + m.heads; }

// Numbers of a row behind the convolution.
inline int convolved_of(const NbMamba2& m) { return channels_of(m) + 2 * m.heads; }

inline bool has_mixer(const NbLayer& l) {
  return l.attention || l.latent_attention || l.delta_net || l.short_conv || l.mamba2;
}
inline bool has_feed_forward(const NbLayer& l) { return l.mlp || l.experts; }

// What a layer's mixer reads and what it ends with.
inline const NbLinearGroup& mixer_in(const NbLayer& l) {
  return l.attention          ? l.attention->qkv
         : l.latent_attention ? l.latent_attention->in
         : l.delta_net        ? l.delta_net->in
         : l.mamba2           ? l.mamba2->in
                              : l.short_conv->in;
}
inline const NbLinearGroup& mixer_out(const NbLayer& l) {
  return l.attention          ? l.attention->o
         : l.latent_attention ? l.latent_attention->o
         : l.delta_net        ? l.delta_net->out
         : l.mamba2           ? l.mamba2->out
                              : l.short_conv->out;
}

// Tokens of a unit, where so many query heads read one key-value head.
inline int unit_tokens(const NbAttention& a) {
  int tokens = kQueryTile / (a.num_heads / a.num_kv_heads);
  return tokens < 1 ? 1 : tokens;
}

inline int unit_tokens(const NbLatentAttention& a) {
  int tokens = kLatentRows / a.num_heads;
  return tokens > kQueryTile ? kQueryTile : tokens < 1 ? 1 : tokens;
}

inline int segments_of(int positions) { return (positions + kSegment - 1) / kSegment; }

// Numbers in the sums of a unit over one segment.
inline size_t partial_width(const NbLatentAttention& a) {
  return size_t(unit_tokens(a)) * a.num_heads * (a.kv_rank + 2);
}

// Units of a step, and the segments that the longest has where threads share them, as there are few units; else 1.
struct Sharing {
  int units = 0, segments = 1;
  Sharing(const NbLatentAttention& a, const NbBatch& batch, int threads) {
    int most = 1;
    for (int i = 0; i < batch.num_items; i++) {
      const NbItem& item = batch.items[i];
      int own = segments_of(item.start + item.count);
      most = own > most ? own : most;
      units += (item.count + unit_tokens(a) - 1) / unit_tokens(a);
    }
    if (threads > 1 && units < 2 * threads && units * most * partial_width(a) <= kPartials) segments = most;
  }
};

inline size_t partial_numbers(const NbLatentAttention& a, const NbBatch& batch, int threads) {
  Sharing sharing(a, batch, threads);
  return sharing.segments > 1 ? sharing.units * sharing.segments * partial_width(a) : 0;
}

// Experts that a token goes through.
inline int paths(const NbExperts& e) { return e.top_k + (e.shared ? 1 : 0); }

inline int most_units(int tokens, const NbExperts& e) {
  int pairs = tokens * paths(e), all = e.num_experts + (e.shared ? 1 : 0);
  return (pairs < all ? pairs : all) + pairs / kExpertRows;
}

// Numbers a pair has between its products.
inline int inner_width(const NbExperts& e) {
  int width = e.experts[0].intermediate;
  return e.shared && e.shared->intermediate > width ? e.shared->intermediate : width;
}

}  // namespace nibble

// The plain C interface of the CPU kernels: what Python hands over, and the functions it calls. Everything is a plain
// array or a pointer to one; nobody here owns any of it, or knows what a request is.
//
//   linear   one prepared weight: y [rows, n] = x [rows, k] W^T + bias
//   input    how a row of activations is prepared for a product: int8 codes by group, or bfloat16
//   group    any number of linears that read the same activations (q, k, v; gate, up; o; down; head)
//
// Weights lie in tiles of 16 outputs, columns in fours (integers) or twos (bfloat16, FP8), so that one vector load holds
// 16 outputs and a broadcast of 4 (2) activations meets it; k_padded is a whole number of groups, padded with zeros:
//
//   U4    [n/16][k/8][64 bytes]     byte 4*output + j: column j in the low nibble, column 4 + j in the high one
//   T4    as U4; code c is the number table[c] - midpoint
//   U8    [n/16][k/4][64 bytes]     byte 4*output + j: column j
//   FP8   [n/16][k/2][2][16 bytes]  even columns, then odd ones
//   DENSE [n/16][k/2][16][2]
//   scales  [n/16][groups][16]      half (integers) or float32 (FP8); none for DENSE
//   offsets [n/16][groups][16]      zeros uint8 or minima half
#pragma once
#include <stdint.h>

#define NB_ABI_VERSION 18
#define NB_MAX_INPUTS 4  // ways in which a group's activations are prepared: groups of codes, orders of columns
#define NB_MAX_ROPES 4

enum NbFormat { NB_U4 = 0, NB_U8 = 1, NB_FP8 = 2, NB_DENSE = 3, NB_T4 = 4 };
enum NbOffset { NB_MIDPOINT = 0, NB_ZEROS = 1, NB_MINS = 2 };
enum NbScoring { NB_SOFTMAX = 0, NB_SIGMOID = 1 };
enum NbActivation { NB_SILU = 0, NB_GELU_TANH = 1, NB_RELU2 = 2 };
enum NbGate { NB_NO_GATE = 0, NB_GATE_OF_QUERIES = 1, NB_GATE_LAST = 2 };

extern "C" {

struct NbLinear {
  int32_t format;
  int32_t offset;      // NbOffset, of integer formats
  int32_t n;
  int32_t group;       // columns that share a scale; a multiple of 8, at most 128 for integers
  int32_t groups;
  int32_t midpoint;    // what codes without zeros or minima are relative to
  int32_t input;       // which of the group's inputs it reads
  float multiplier;    // of the whole product: what makes the scales fit in halves
  const uint8_t* data;
  const void* scales;
  const void* offsets;
  const float* bias;   // [n] or null
  const uint8_t* table;  // [16] of T4, at most 127 each
};

struct NbInput {
  int32_t k;
  int32_t k_padded;
  int32_t group;       // of the int8 codes; 0: bfloat16
  int32_t sum_group;   // columns whose sums bfloat16 products need for their offsets; 0: none
  const int32_t* perm; // [k]: column j is feature perm[j]; or null
};

struct NbLinearGroup {
  int32_t num_inputs;    // at most NB_MAX_INPUTS
  int32_t num_linears;
  const NbInput* inputs;
  const NbLinear* linears;
};

// How the first dimensions of a head turn.
struct NbRope {
  int32_t dim;                       // how many; all of them where dim is head_dim
  float factor;                      // of cosines and sines
  int32_t interleaved;               // neighbours pair up, else halves
  const float* inv_freq;             // [dim / 2]
  const float* long_inv_freq;        // the same of items that are long, or null: no others
};

struct NbAttention {
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t rope;                      // which of the model's
  int32_t window;                    // positions seen, the own included; 0: all
  int32_t qk_norm_all;               // q_norm and k_norm are of all heads side by side, else of each
  float scale;                       // of queries times keys
  float soft_cap;                    // scores become cap * tanh(scores / cap); 0: they do not
  float query_beta;                  // queries times 1 + query_beta * log(1 + position / query_length)
  int32_t query_length;              // 0: they are not
  int32_t output_gate;               // NbGate: what heads give is times sigmoid(gate); qkv gives [query, gate] of each
                                     // head, or the gates of all heads behind q, k and v
  int32_t head_gate;                 // behind all that one number a head: what it gives is times sigmoid of that
  int32_t reads_only;                // keys and values are another layer's: there are only queries
  int32_t keys_are_values;           // values are the keys before norm and rotation: there are only queries and keys
  const float* q_norm;               // [head_dim] or [heads * head_dim], or null
  const float* k_norm;
  const float* v_norm;               // [head_dim] or null
  const float* sinks;                // [num_heads] scores that take part in each softmax and add no value, or null
  NbLinearGroup qkv, o;
};

// See latent_attention.h.
struct NbLatentAttention {
  int32_t num_heads, q_rank, kv_rank;  // q_rank 0: queries are made at once
  int32_t nope_dim, rope_dim, value_dim;
  int32_t rope;                      // which of the model's
  float scale, eps;                  // of queries times keys; of its own norms
  float query_beta;                  // as in NbAttention
  int32_t query_length;
  const float* q_norm;               // [q_rank] or null
  const float* kv_norm;              // [kv_rank]
  NbLinearGroup in, q_b;             // q or q_a, then kv_a; of q_b, no linears where q_rank is 0
  NbLinearGroup keys, values;        // one a head: nope_dim -> kv_rank, which meets queries; kv_rank -> value_dim
  NbLinearGroup o;
};

// See delta_net.h.
struct NbDeltaNet {
  int32_t key_heads, value_heads, key_dim, value_dim;
  int32_t taps;                      // of the convolution, the token's own included
  const float* filters;              // [taps, channels], oldest first
  const float* rate;                 // [value_heads] log of the decay of a step of length 1
  const float* dt_bias;              // [value_heads]
  const float* norm;                 // [value_dim]
  NbLinearGroup in, out;             // q, k and v; z; b; a: side by side
};

// See mamba2.h.
struct NbMamba2 {
  int32_t heads, head_dim, state_dim, groups;
  int32_t taps;                      // of the convolution, the token's own included
  float min_step, max_step;          // of a token, before which there is a softplus
  const float* filters;              // [taps, channels], oldest first
  const float* conv_bias;            // [channels] or null
  const float* rate;                 // [heads] log of the decay of a step of length 1
  const float* dt_bias;              // [heads]
  const float* skip;                 // [heads] D
  const float* norm;                 // [heads * head_dim]
  NbLinearGroup in, out;             // z, x, B, C and dt side by side
};

// B, C and x from one product: out(C * conv(B * x)).
struct NbShortConv {
  int32_t channels;
  int32_t taps;                      // of the convolution, the token's own included
  const float* filters;              // [taps, channels], oldest first
  const float* bias;                 // [channels] or null
  NbLinearGroup in, out;
};

// gate_up of one linear is up alone: down(act(up)).
struct NbGatedMlp {
  int32_t intermediate;
  int32_t activation;                // NbActivation
  int32_t sparse;                    // gates become relu(gate - mean - deviations * standard deviation of a row's)
  float deviations;
  float alpha, limit;                // (u + 1) g sigmoid(alpha g), g = min(gate, limit), u = up in +-limit; 0: not so
  NbLinearGroup gate_up, down;
};

// What a layer is told of the token once more: x += norm(projection(activation(gate(x)) * input)).
struct NbPerLayerInput {
  const float* norm;                 // [hidden]
  NbLinearGroup gate, projection;
};

// Those inputs, of all layers: (norm(projection(embedded) * projection_scale) + table[token] * table_scale) / sqrt(2)
struct NbPerLayerInputs {
  int32_t width;                     // of one
  int32_t activation;
  int32_t vocab;                     // tokens beyond it have the row of token 0
  float projection_scale, table_scale;
  const uint16_t* table;             // bfloat16 [vocab, num_layers * width]
  const float* norm;                 // [width]
  NbLinearGroup projection;
};

// A token goes through the top_k of num_experts that score highest; what they give is added, weighted.
struct NbExperts {
  int32_t num_experts, top_k;
  int32_t scoring;                   // NbScoring
  int32_t norm_weights;              // the scores of the chosen are divided by their sum
  int32_t groups, best_groups;       // only experts of the best groups are chosen; 0: of all
  int32_t group_rank;                // how many of a group's best scores are summed to rank it
  float routed_scale;                // of the weights
  const float* router;               // [num_experts, hidden]
  const float* router_bias;          // [num_experts] or null
  const float* correction_bias;      // [num_experts] what is added to the scores to choose by, or null
  const NbGatedMlp* experts;         // [num_experts]
  const NbGatedMlp* shared;          // which every token goes through, or null
  const float* shared_gate;          // [hidden] its weight is sigmoid(h . gate); null: 1
  int32_t latent;                    // width of what experts (but not the shared one) read and give; 0: hidden
  NbLinearGroup into, out_of;        // the latent space
  const float* norm;                 // [hidden] what experts read is h times this, what the router reads is h; or null
  const float* scales;               // [num_experts] of the weights of those that are chosen, or null
};

// A second way around the mixer: x = (x + mixed + h + norm(right(left(h)))) / sqrt(2), h what the mixer reads.
struct NbLaurel {
  int32_t rank;
  const float* norm;                 // [hidden]
  NbLinearGroup left, right;
};

// How a layer moves its streams along, see alt_up.h.
struct NbAltUpLayer {
  const float* router;               // [streams, hidden]
  const float* predictions;          // [streams (to), streams (from), streams]
  const float* corrections;          // [streams, streams]
  const float* scale;                // [hidden] of what the per-layer gate reads, or null
};

// A token has so many hidden states. The first is embedded, the others are projections of it.
struct NbAltUp {
  int32_t streams, active;
  NbLinearGroup into;                // of all but the first, side by side
  const NbLinearGroup* back;         // [streams - 1]
};

// Norms are [hidden] or null. At most one of the mixers is there. An MLP and experts both: norm(mlp) + norm(experts).
struct NbLayer {
  const float* before_mixer;
  const float* after_mixer;
  const float* before_mlp;
  const float* after_mlp;
  const float* after_dense;          // of what the MLP gives, and the experts, where there are both
  const float* after_experts;
  const float* before_experts;       // of what the router reads
  const NbAttention* attention;
  const NbLatentAttention* latent_attention;
  const NbDeltaNet* delta_net;
  const NbShortConv* short_conv;
  const NbMamba2* mamba2;
  const NbGatedMlp* mlp;
  const NbExperts* experts;
  const NbPerLayerInput* per_layer_input;  // or null
  const NbLaurel* laurel;            // or null
  const NbAltUpLayer* alt_up;        // where the model has streams
  float scalar;                      // what leaves the layer is multiplied by it
};

// Consecutive layers of a model. The first of a model embeds its tokens, the last norms and has the output head.
struct NbModel {
  int32_t hidden, num_layers, num_ropes, vocab;
  float eps, after_eps;              // of norms; of those after mixers and feed-forwards
  float embedding_scale;
  int32_t block_size;                // tokens a KV block, a multiple of 16
  const NbLayer* layers;
  const NbRope* ropes;               // at most NB_MAX_ROPES
  const uint16_t* embedding;         // bfloat16 [vocab, hidden]; null: hidden states are given
  const float* embedding_norm;       // [hidden] of what is embedded, or null
  const float* norm;                 // [hidden] the final norm; null: layers follow elsewhere
  const NbPerLayerInputs* per_layer_inputs;  // or null
  const NbAltUp* alt_up;             // or null
  NbLinearGroup head;                // no linears: it is elsewhere
};

// One step: the tokens of all items side by side. Item i computes tokens start .. start + count of one request. is_long:
// the request has more tokens than the inv_freq of ropes are for.
struct NbItem {
  int32_t count, start, is_long;
};

// Where an item's recurrent state is read (-1: it is zero) and written, and which pairs of snapshots are its own.
struct NbItemState {
  int32_t read, write, snapshot, num_snapshots;
};

struct NbBatch {
  int32_t num_tokens, num_items;
  const int32_t* tokens;             // [num_tokens]
  const NbItem* items;
  const int32_t* tables;             // blocks of all items, of all KV groups
  const int32_t* table_starts;       // [groups, items] where those of an item begin
  const int32_t* layer_groups;       // [layers] the KV group of each layer that sees a cache
  uint8_t* cache;                    // of each layer [blocks][kv_heads][keys, values, scales], see kv_cache.h, or latents
  const int64_t* cache_offsets;      // [layers] bytes before that of a layer, or of the one whose keys and values it reads
  int32_t cache_int8;                // else bfloat16
  float* states;                     // of each layer that has one [slots][numbers]: inputs of its convolution, matrices
  int64_t num_slots;
  const NbItemState* item_states;
  const int32_t* snapshots;          // pairs: after how many of an item's tokens its state goes to which slot, too
  const int32_t* last_seen;          // [num_tokens] the last position that a token attends to; null: its own
};

struct NbPool;

const char* nb_build(void);                                // hash of the sources the library was built from
int32_t nb_abi_version(void);
const char* nb_isas(void);                                 // what this machine can run, best first, comma-separated
NbPool* nb_pool_new(int32_t threads, const char* isa);     // null: no such instruction set here
void nb_pool_free(NbPool*);
// hidden [num_tokens, hidden]: what the layers give, normed by the final norm; where nothing is embedded, also what
// they take.
void nb_forward(NbPool*, const NbModel*, const NbBatch*, float* hidden);
void nb_logits(NbPool*, const NbModel*, const float* hidden, int32_t rows, float* logits);  // normed -> [rows, vocab]
void nb_linear(NbPool*, const NbLinearGroup*, const float* x, int32_t rows, float* y);  // the group's linears side by side
}

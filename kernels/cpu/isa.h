// What the code of every instruction set offers, and what it is given: jobs with all memory already in place.
#pragma once
#include "abi.h"
#include "pool.h"

namespace nibble {

// Some tokens of one item, attended to together.
struct Unit {
  int32_t item, first, count;
};

struct StepBuffers {
  char* inputs[NB_MAX_INPUTS];  // prepared activations, see InputBuffer
  float* scales[NB_MAX_INPUTS];
  int32_t* sums[NB_MAX_INPUTS];
  float* qkv;            // [tokens, heads + 2 kv_heads, head_dim]
  uint16_t* queries;     // [kv_heads, tokens, heads of one, head_dim]
  float* attended;       // [tokens, heads, head_dim]
  float* y;              // [tokens, hidden]: a product whose norm comes before the sum
  float* inner;          // [tokens, intermediate]
  float* angles[2];      // [tokens, 2, head_dim / 2]: cosines, sines
  int32_t* row_items;    // [tokens] which item a row belongs to
  int32_t* item_rows;    // [items] its first row
  Unit* units;
  int32_t num_units;
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

constexpr int kQueryTile = 32;  // query rows (token, head) of a unit

}  // namespace nibble

// What stands between the products: exp, norms, activation functions, rotary embedding, and the preparation of a row of
// activations for a product.
#pragma once
#include <math.h>
#include "gemm.h"

namespace NB_ISA {

// e^x to some 1e-7 of itself; 0 below -87. NaN stays NaN.
inline F32 f_exp(F32 x) {
  x = f_min(f_set(88.0f), f_max(f_set(-87.0f), x));
  F32 n = f_round(f_mul(x, f_set(1.44269504f)));
  F32 r = f_fma(n, f_set(-0.693359375f), x);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  F32 p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(p, f_mul(r, r), f_add(r, f_set(1.0f)));
  return f_scale(p, n);
}

inline F32 sigmoid(F32 x) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

// relu2(x) = max(x, 0)^2
// gelu(x) = x / 2 (1 + tanh(u)) = x sigmoid(2 u)
inline F32 activate(F32 x, int activation) {
  if (activation == NB_SILU) return f_mul(x, sigmoid(x));
  if (activation == NB_RELU2) {
    F32 above = f_max(f_zero(), x);  // what is no number stays so
    return f_mul(above, above);
  }
  F32 u = f_mul(x, f_fma(f_mul(x, x), f_set(0.044715f * 1.59576912f), f_set(1.59576912f)));
  return f_mul(x, sigmoid(u));
}

// (u + 1) g sigmoid(alpha g), g = min(gate, limit), u = up within +-limit
inline F32 clamped(F32 gate, F32 up, float alpha, float limit) {
  F32 most = f_set(limit), least = f_set(-limit);
  F32 g = f_min(most, gate), u = f_max(least, f_min(most, up));  // what is no number stays so
  return f_mul(f_add(u, f_set(1.0f)), f_mul(g, sigmoid(f_mul(g, f_set(alpha)))));
}

// out = x / rms(x) * weight; n a multiple of 16. x may be out.
inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  F32 squares = f_zero();
  for (int i = 0; i < n; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  F32 factor = f_set(1.0f / sqrtf(f_sum(squares) / n + eps));
  for (int i = 0; i < n; i += 16) f_store(out + i, f_mul(f_mul(f_load(x + i), factor), f_load(weight + i)));
}

// What is written where one input's rows are prepared.
struct InputBuffer {
  char* data;      // [rows, k_padded] int8 or bfloat16
  float* scale;    // [rows, groups]
  int32_t* sum;    // [rows, groups]
};

inline int groups_of(const NbInput& input) {
  int size = input.group ? input.group : input.sum_group;
  return size ? (input.k_padded + size - 1) / size : 0;
}

inline Activations view(const NbInput& input, const InputBuffer& buffer) {
  return {buffer.data, buffer.scale, buffer.sum, input.k_padded, groups_of(input), input.group != 0};
}

// A group of at most 128 values to int8: q = round(x / scale), scale = max |x| / 127. Not-a-number poisons the scale, so
// that it comes out of the product.
inline void quantize_group(const float* x, int n, int8_t* q, float* scale, int32_t* sum) {
  F32 largest = f_zero(), poison = f_zero();
  for (int i = 0; i < n; i += 16) {
    F32 v = f_first(f_load(x + i), n - i, 0.0f);
    largest = f_max(largest, f_abs(v));
    poison = f_fma(v, f_zero(), poison);
  }
  float top = f_largest(largest);
  F32 inverse = f_set(top > 0.0f ? 127.0f / top : 0.0f);
  int32_t total = 0;
  alignas(64) int8_t codes[16];
  for (int i = 0; i < n; i += 16) {
    i_store_s8(codes, i_round(f_mul(f_first(f_load(x + i), n - i, 0.0f), inverse)));
    int count = min_int(16, n - i);
    memcpy(q + i, codes, count);
    for (int j = 0; j < count; j++) total += codes[j];
  }
  *scale = top / 127.0f + f_sum(poison);
  *sum = total;
}

inline void to_bf16(const NbInput& input, const float* x, uint16_t* out, float* sums) {
  for (int i = 0; i < input.k_padded; i += 16) {
    alignas(64) uint16_t lanes[16];
    f_store_bf16(lanes, f_load(x + i));
    memcpy(out + i, lanes, 2 * min_int(16, input.k_padded - i));
  }
  if (!input.sum_group) return;
  for (int g = 0; g * input.sum_group < input.k_padded; g++) {
    float total = 0.0f;
    for (int i = g * input.sum_group; i < min_int((g + 1) * input.sum_group, input.k_padded); i++) {
      uint32_t bits = (uint32_t)out[i] << 16;
      float value;
      memcpy(&value, &bits, 4);
      total += value;
    }
    sums[g] = total;
  }
}

// Prepares row `row` of one input from x [k]; padded is scratch for k_padded + 16 floats.
inline void prepare(const NbInput& input, const InputBuffer& buffer, int row, const float* x, float* padded) {
  if (input.perm)
    for (int i = 0; i < input.k; i++) padded[i] = x[input.perm[i]];
  else
    memcpy(padded, x, sizeof(float) * input.k);
  for (int i = input.k; i < input.k_padded + 16; i++) padded[i] = 0.0f;
  int64_t groups = groups_of(input), at = row * groups;
  if (!input.group) {
    to_bf16(input, padded, (uint16_t*)buffer.data + (int64_t)row * input.k_padded, buffer.scale + at);
    return;
  }
  int8_t* q = (int8_t*)buffer.data + (int64_t)row * input.k_padded;
  for (int g = 0; g < groups; g++) {
    int first = g * input.group;
    quantize_group(padded + first, min_int(input.group, input.k_padded - first), q + first, buffer.scale + at + g,
                   buffer.sum + at + g);
  }
}

// Calls f(row) for every row, some rows a chunk.
template <class F> inline void for_rows(Worker& worker, int rows, F f) {
  int size = rows / (4 * worker.threads);
  size = size < 1 ? 1 : size > 16 ? 16 : size;
  nibble::parallel(worker, (rows + size - 1) / size, [&](int chunk) {
    for (int row = chunk * size; row < min_int(rows, (chunk + 1) * size); row++) f(row);
  });
}

// act(gate) * up, or act(up), of some rows, tiles [tile, end): out is where the first row's first output goes.
inline void gated_product(Worker& worker, const NbGatedMlp& mlp, const InputBuffer* inputs, int row, int rows, int tile,
                          int end, float* out, int64_t stride) {
  const NbLinearGroup& group = mlp.gate_up;
  bool gated = group.num_linears > 1;
  const NbLinear &gate = group.linears[0], &up = group.linears[gated ? 1 : 0];
  int columns = (end - tile) * 16, outputs = min_int(columns, gate.n - tile * 16);
  float *gates = (float*)worker.scratch, *ups = gates + kMaxRows * 256;
  product<false>(gate, view(group.inputs[gate.input], inputs[gate.input]), row, rows, tile, end, gates, columns);
  if (gated) product<false>(up, view(group.inputs[up.input], inputs[up.input]), row, rows, tile, end, ups, columns);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < outputs; i += 16) {
      F32 gate = f_load(gates + r * columns + i), y;
      if (mlp.limit) y = clamped(gate, f_load(ups + r * columns + i), mlp.alpha, mlp.limit);
      else y = activate(gate, mlp.activation);
      if (gated && !mlp.limit) y = f_mul(y, f_load(ups + r * columns + i));
      f_store(out + r * stride + i, y);
    }
}

inline void prepare_all(const NbLinearGroup& group, const InputBuffer* buffers, int row, const float* x, float* padded) {
  for (int i = 0; i < group.num_inputs; i++) prepare(group.inputs[i], buffers[i], row, x, padded);
}

// Rotate one head in place: (i, i + dim/2) pair up, or (2 i, 2 i + 1).
inline void rotate(float* x, const NbRope& rope, const float* cosines, const float* sines) {
  int half = rope.dim / 2;
  if (rope.interleaved) {
    for (int i = 0; i < half; i++) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  float* high = x + half;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = high[i];
    x[i] = a * cosines[i] - b * sines[i];
    high[i] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace NB_ISA

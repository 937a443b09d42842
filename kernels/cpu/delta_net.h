// The gated delta rule between its linears, token by token, so that a result does not depend on how a prompt is cut up:
//
//   a row of the product     [q k v | z | b | a]     b and a become beta and decay in place
//   convolved                [q k v]                 through silu; q and k of length 1, q over sqrt(key_dim)
//   state of a request       [taps - 1][channels] inputs of the convolution, oldest first; [value_heads][key_dim][value_dim]
//
//   S = decay S;  S = S + k (beta (v - S^T k))^T;  o = S^T q       columns of S know nothing of one another
#pragma once
#include "convolution.h"
#include "isa.h"

namespace NB_ISA {

constexpr int kColumns = 64;  // of a value head, carried through all tokens of an item by one thread

// One layer, and its states in their slots.
struct DeltaNet {
  const NbDeltaNet& d;
  float* states;

  int keys() const { return d.key_heads * d.key_dim; }
  int values() const { return d.value_heads * d.value_dim; }
  int channels() const { return nibble::channels_of(d); }
  int width() const { return nibble::width_of(d); }
  Convolution convolution() const { return {d.taps, channels(), width(), d.filters}; }
  int64_t state_size() const { return convolution().state_size() + (int64_t)values() * d.key_dim; }
  float* matrix(int slot, int head) const {
    return states + slot * state_size() + convolution().state_size() + (int64_t)head * d.key_dim * d.value_dim;
  }
  int blocks() const { return (d.value_dim + kColumns - 1) / kColumns; }
};

inline void scale_to(float* x, int n, float length) {
  F32 squares = f_zero();
  for (int i = 0; i < n; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  F32 factor = f_set(length / sqrtf(f_sum(squares) + 1e-6f));
  for (int i = 0; i < n; i += 16) f_store(x + i, f_mul(f_load(x + i), factor));
}

// Row `since` of an item whose rows begin at `first`: out [channels].
inline void convolve(const DeltaNet& net, const float* first, int since, const float* before, float* out) {
  const NbDeltaNet& d = net.d;
  Convolution convolution = net.convolution();
  for (int c = 0; c < convolution.channels; c += 16)
    f_store(out + c, activate(convolution.at(first, since, before, c), NB_SILU));
  for (int h = 0; h < d.key_heads; h++) {
    scale_to(out + h * d.key_dim, d.key_dim, 1.0f / sqrtf((float)d.key_dim));
    scale_to(out + net.keys() + h * d.key_dim, d.key_dim, 1.0f);
  }
}

// b and a of a row to beta and decay.
inline void gates(const DeltaNet& net, float* row) {
  float *b = row + net.channels() + net.values(), *a = b + net.d.value_heads;
  for (int h = 0; h < net.d.value_heads; h++) {
    b[h] = 1.0f / (1.0f + expf(-b[h]));
    float x = a[h] + net.d.dt_bias[h];
    a[h] = expf(net.d.rate[h] * (x > 20.0f ? x : log1pf(expf(x))));
  }
}

// One token through 16 N columns of a head's matrix.
template <int N>
inline void delta_step(const NbDeltaNet& d, float* state, const float* q, const float* k, const float* v, float decay,
                       float beta, float* out) {
  F32 known[N], delta[N], sum[N];
  for (int n = 0; n < N; n++) known[n] = sum[n] = f_zero();
  for (int i = 0; i < d.key_dim; i++) {
    F32 key = f_set(k[i]);
    for (int n = 0; n < N; n++) known[n] = f_fma(f_load(state + (int64_t)i * d.value_dim + 16 * n), key, known[n]);
  }
  F32 left = f_set(decay);
  for (int n = 0; n < N; n++) delta[n] = f_mul(f_set(beta), f_sub(f_load(v + 16 * n), f_mul(left, known[n])));
  for (int i = 0; i < d.key_dim; i++) {
    F32 key = f_set(k[i]), query = f_set(q[i]);
    for (int n = 0; n < N; n++) {
      float* place = state + (int64_t)i * d.value_dim + 16 * n;
      F32 s = f_fma(key, delta[n], f_mul(left, f_load(place)));
      f_store(place, s);
      sum[n] = f_fma(s, query, sum[n]);
    }
  }
  for (int n = 0; n < N; n++) f_store(out + 16 * n, sum[n]);
}

// norm(o) * w * silu(z) of all heads of a row, in place.
inline void gated_norm(const DeltaNet& net, float* o, const float* z, float eps) {
  int dim = net.d.value_dim;
  for (int h = 0; h < net.d.value_heads; h++) rms_norm(o + h * dim, net.d.norm, dim, eps, o + h * dim);
  for (int i = 0; i < net.values(); i += 16) f_store(o + i, f_mul(f_load(o + i), activate(f_load(z + i), NB_SILU)));
}

}  // namespace NB_ISA

// Mamba-2 between its linears, as a recurrence over the tokens, so that a result does not depend on how a prompt is cut
// up:
//
//   a row of the product     [z | x B C | dt]
//   convolved                [x B C | step | decay]   x B C through silu; a number a head
//   state of a request       [taps - 1][channels] inputs of the convolution, oldest first; [heads][state_dim][head_dim]
//
//   S = decay S + B (step x)^T;  y = S^T C + D x       columns of S know nothing of one another
//
// Some tokens go through a row of S while it is in registers: each does to it what it would do alone.
#pragma once
#include "convolution.h"
#include "isa.h"

namespace NB_ISA {

constexpr bool kManyRegisters = kTiles * kAccumulators > 8;
constexpr int kSteps = kManyRegisters ? 4 : 2;      // tokens that meet a row of S at once
constexpr int kStepLanes = kManyRegisters ? 2 : 1;  // times 16 columns of it
constexpr int kOneLanes = kManyRegisters ? 4 : 2;   // where there is one token

// One layer, and its states in their slots.
struct Mamba2 {
  const NbMamba2& m;
  float* states;

  int values() const { return m.heads * m.head_dim; }
  int channels() const { return nibble::channels_of(m); }
  int width() const { return nibble::width_of(m); }
  int convolved_width() const { return nibble::convolved_of(m); }
  Convolution convolution() const { return {m.taps, channels(), width(), m.filters}; }
  int64_t state_size() const { return convolution().state_size() + (int64_t)values() * m.state_dim; }
  float* matrix(int slot, int head) const {
    return states + slot * state_size() + convolution().state_size() + (int64_t)head * m.state_dim * m.head_dim;
  }
};

// Row `since` of an item whose x B C begin at `first`; dt: of that row.
inline void convolve(const Mamba2& net, const float* first, int since, const float* before, const float* dt, float* out) {
  const NbMamba2& m = net.m;
  Convolution convolution = net.convolution();
  for (int c = 0; c < convolution.channels; c += 16) {
    F32 x = convolution.at(first, since, before, c);
    if (m.conv_bias) x = f_add(x, f_load(m.conv_bias + c));
    f_store(out + c, activate(x, NB_SILU));
  }
  float *step = out + convolution.channels, *decay = step + m.heads;
  for (int h = 0; h < m.heads; h++) {
    float x = dt[h] + m.dt_bias[h], s = x > 20.0f ? x : log1pf(expf(x));
    s = s < m.min_step ? m.min_step : s > m.max_step ? m.max_step : s;  // what is no number stays so
    step[h] = s;
    decay[h] = expf(m.rate[h] * s);
  }
}

// T tokens through 16 N columns of a head's matrix. row: the convolved row of the first, out: its y there.
template <int T, int N>
inline void mamba_step(const Mamba2& net, float* state, const float* row, int head, int column, float* out) {
  const NbMamba2& m = net.m;
  int channels = net.channels(), stride = net.convolved_width(), dim = m.head_dim;
  const float* b = row + net.values() + head / (m.heads / m.groups) * m.state_dim;
  const float* c = b + m.groups * m.state_dim;
  F32 left[T], added[T][N], y[T][N], skip = f_set(m.skip[head]);
  for (int t = 0; t < T; t++) {
    const float *own = row + t * stride, *x = own + head * dim + column;
    left[t] = f_set(own[channels + m.heads + head]);
    for (int n = 0; n < N; n++) {
      added[t][n] = f_mul(f_set(own[channels + head]), f_load(x + 16 * n));
      y[t][n] = f_mul(skip, f_load(x + 16 * n));
    }
  }
  for (int i = 0; i < m.state_dim; i++) {
    float* place = state + (int64_t)i * dim;
    F32 s[N];
    for (int n = 0; n < N; n++) s[n] = f_load(place + 16 * n);
    for (int t = 0; t < T; t++) {
      F32 write = f_set(b[t * stride + i]), read = f_set(c[t * stride + i]);
      for (int n = 0; n < N; n++) {
        s[n] = f_fma(write, added[t][n], f_mul(left[t], s[n]));
        y[t][n] = f_fma(s[n], read, y[t][n]);
      }
    }
    for (int n = 0; n < N; n++) f_store(place + 16 * n, s[n]);
  }
  for (int t = 0; t < T; t++)
    for (int n = 0; n < N; n++) f_store(out + (int64_t)t * net.values() + 16 * n, y[t][n]);
}

// T tokens through a whole head's matrix.
template <int T, int N>
inline void mamba_head(const Mamba2& net, float* state, const float* row, int head, float* out) {
  int d = 0;
  for (; d + 16 * N <= net.m.head_dim; d += 16 * N) mamba_step<T, N>(net, state + d, row, head, d, out + d);
  for (; d < net.m.head_dim; d += 16) mamba_step<T, 1>(net, state + d, row, head, d, out + d);
}

// norm(y * silu(z)) of the heads of each group of a row, in place.
inline void gated_norm(const Mamba2& net, float* y, const float* z, float eps) {
  int width = net.values() / net.m.groups;
  for (int i = 0; i < net.values(); i += 16) f_store(y + i, f_mul(f_load(y + i), activate(f_load(z + i), NB_SILU)));
  for (int i = 0; i < net.values(); i += width) rms_norm(y + i, net.m.norm + i, width, eps, y + i);
}

}  // namespace NB_ISA

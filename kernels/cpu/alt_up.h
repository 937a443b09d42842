// Several hidden states a token, "streams", of which a layer computes one and moves the others along:
//
//   streams [tokens, streams, hidden]
//   predicted[to] = streams[to] + sum over from of (predictions[to, from] . r) streams[from],  r = tanh(router . norm(active))
//   x = predicted[active] -> the layer -> x
//   streams[to] = predicted[to] + (1 + corrections[to] . r) (x - predicted[active]),           r = tanh(router . norm(x))
//
// All of it is of single rows.
#pragma once
#include "glue.h"

namespace NB_ISA {

constexpr int kMaxStreams = 16;

// r [streams]
inline void route_streams(const NbAltUpLayer& a, const float* x, int streams, int hidden, float eps, float* r) {
  F32 squares = f_zero();
  for (int i = 0; i < hidden; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  float factor = 1.0f / sqrtf(f_sum(squares) / hidden + eps);
  for (int s = 0; s < streams; s++) {
    const float* weights = a.router + (int64_t)s * hidden;
    F32 sum = f_zero();
    for (int i = 0; i < hidden; i += 16) sum = f_fma(f_load(x + i), f_load(weights + i), sum);
    r[s] = tanhf(f_sum(sum) * factor);
  }
}

inline float dot_streams(const float* weights, const float* r, int streams) {
  float sum = 0.0f;
  for (int s = 0; s < streams; s++) sum += weights[s] * r[s];
  return sum;
}

// streams [streams, hidden] of a token become what is predicted of them.
inline void predict_streams(const NbAltUpLayer& a, const NbAltUp& m, int hidden, float eps, float* streams) {
  int n = m.streams;
  float r[kMaxStreams], shares[kMaxStreams * kMaxStreams];
  route_streams(a, streams + (int64_t)m.active * hidden, n, hidden, eps, r);
  for (int i = 0; i < n * n; i++) shares[i] = dot_streams(a.predictions + i * n, r, n);
  for (int i = 0; i < hidden; i += 16) {
    F32 before[kMaxStreams];
    for (int s = 0; s < n; s++) before[s] = f_load(streams + (int64_t)s * hidden + i);
    for (int to = 0; to < n; to++) {
      F32 sum = before[to];
      for (int from = 0; from < n; from++) sum = f_fma(f_set(shares[to * n + from]), before[from], sum);
      f_store(streams + (int64_t)to * hidden + i, sum);
    }
  }
}

// streams: predicted ones, which become those after the layer; x [hidden]: what it computed of the active one.
inline void correct_streams(const NbAltUpLayer& a, const NbAltUp& m, int hidden, float eps, const float* x,
                            float* streams) {
  int n = m.streams;
  float r[kMaxStreams], shares[kMaxStreams];
  route_streams(a, x, n, hidden, eps, r);
  for (int s = 0; s < n; s++) shares[s] = 1.0f + dot_streams(a.corrections + s * n, r, n);
  for (int i = 0; i < hidden; i += 16) {
    F32 news = f_sub(f_load(x + i), f_load(streams + (int64_t)m.active * hidden + i));
    for (int s = 0; s < n; s++) {
      float* place = streams + (int64_t)s * hidden + i;
      f_store(place, f_fma(f_set(shares[s]), news, f_load(place)));
    }
  }
}

inline float mean_square(const float* x, int n) {
  F32 squares = f_zero();
  for (int i = 0; i < n; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  return f_sum(squares) / n;
}

// What x is multiplied by to be as long as `like`; x is taken to be no shorter than some 0.003.
inline float as_long(const float* x, const float* like, int n) {
  float found = mean_square(x, n);
  return sqrtf(mean_square(like, n)) / sqrtf(found < 1e-5f ? 1e-5f : found);
}

// gates [n] become how far each is above their mean and so many standard deviations, else 0. A NaN makes all NaN.
inline void above_cutoff(float* gates, int n, float deviations) {
  F32 sum = f_zero(), squares = f_zero();
  for (int i = 0; i < n; i += 16) sum = f_add(sum, f_load(gates + i));
  F32 mean = f_set(f_sum(sum) / n);
  for (int i = 0; i < n; i += 16) {
    F32 d = f_sub(f_load(gates + i), mean);
    squares = f_fma(d, d, squares);
  }
  F32 cutoff = f_fma(f_set(deviations), f_set(sqrtf(f_sum(squares) / n)), mean);
  for (int i = 0; i < n; i += 16) f_store(gates + i, f_max(f_zero(), f_sub(f_load(gates + i), cutoff)));
}

}  // namespace NB_ISA

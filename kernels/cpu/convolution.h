// A causal convolution of a few taps, one filter a channel, over the rows of an item and the inputs in its state before
// them, [taps - 1][channels], oldest first.
#pragma once
#include "glue.h"

namespace NB_ISA {

struct Convolution {
  int taps, channels, width;  // width: numbers from one row to the next
  const float* filters;       // [taps, channels], oldest first

  int64_t state_size() const { return (int64_t)(taps - 1) * channels; }

  // The input `back` tokens before row `since` of an item whose rows begin at `first`; null: it is before token 0.
  // before: the inputs in the item's state, or null.
  const float* input(const float* first, int since, int back, const float* before) const {
    if (back <= since) return first + (int64_t)(since - back) * width;
    return before ? before + (int64_t)(taps - 1 + since - back) * channels : nullptr;
  }

  // 16 channels of row `since`.
  F32 at(const float* first, int since, const float* before, int channel) const {
    F32 sum = f_zero();
    for (int t = 0; t < taps; t++) {
      const float* x = input(first, since, taps - 1 - t, before);
      if (x) sum = f_fma(f_load(x + channel), f_load(filters + (int64_t)t * channels + channel), sum);
    }
    return sum;
  }

  // The inputs that the first `count` rows of an item leave, to `to`, which may be `before`.
  void leave(const float* first, int count, const float* before, float* to) const {
    for (int t = 0; t < taps - 1; t++) {
      const float* x = input(first, count, taps - 1 - t, before);
      float* place = to + (int64_t)t * channels;
      if (x) memmove(place, x, sizeof(float) * channels);
      else memset(place, 0, sizeof(float) * channels);
    }
  }
};

}  // namespace NB_ISA

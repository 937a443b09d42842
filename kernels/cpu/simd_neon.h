// Sixteen lanes at a time, for ARM's NEON with the dot product instructions (FEAT_DotProd, from ARMv8.2 on). Four
// registers hold sixteen.
#pragma once
#include <arm_neon.h>
#include <cstdint>
#include <cstring>

namespace NB_ISA {

// Of 32 registers 16 hold what an inner loop sums up; weights take eight more, the activations of four rows another
// four. So one or two rows work on two tiles, more rows on one after the other. The sums of earlier groups (as many
// registers again) wait in memory while a group's columns are multiplied.
constexpr int kTiles = 2;         // tiles of 16 outputs that one inner loop works on, where its rows leave room
constexpr int kRows = 4;          // rows of activations that it works on
constexpr int kAccumulators = 4;  // sums of 16 lanes that it may keep
constexpr int kWideShift = 128;   // dot4 takes weights of more than 7 bits as this much less than they are

template <class T> struct Four { T a, b, c, d; };
using F32 = Four<float32x4_t>;    // 16 float32
using I32 = Four<int32x4_t>;      // 16 int32
using Bytes = Four<uint8x16_t>;   // 16 lanes of 4 bytes
using Pairs = Bytes;              // 16 lanes of 2 bfloat16
using Codes = int8x8_t;           // 8 columns of one row's int8 activations

// f of every register of the arguments.
template <class F, class... V> inline auto each(F f, V... v) {
  return Four<decltype(f(v.a...))>{f(v.a...), f(v.b...), f(v.c...), f(v.d...)};
}
template <class T> inline Four<T> same(T x) { return {x, x, x, x}; }

inline float32x4_t as_f(uint32x4_t x) { return vreinterpretq_f32_u32(x); }
inline uint32x4_t as_u(float32x4_t x) { return vreinterpretq_u32_f32(x); }
inline uint32x4_t as_u(uint8x16_t x) { return vreinterpretq_u32_u8(x); }
inline uint8x16_t as_bytes(uint32x4_t x) { return vreinterpretq_u8_u32(x); }

inline F32 f_set(float x) { return same(vdupq_n_f32(x)); }
inline F32 f_zero() { return f_set(0.0f); }
inline F32 f_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void f_store(float* p, F32 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
inline F32 f_add(F32 x, F32 y) { return each([](auto a, auto b) { return vaddq_f32(a, b); }, x, y); }
inline F32 f_sub(F32 x, F32 y) { return each([](auto a, auto b) { return vsubq_f32(a, b); }, x, y); }
inline F32 f_mul(F32 x, F32 y) { return each([](auto a, auto b) { return vmulq_f32(a, b); }, x, y); }
inline F32 f_div(F32 x, F32 y) { return each([](auto a, auto b) { return vdivq_f32(a, b); }, x, y); }
inline F32 f_fma(F32 x, F32 y, F32 z) {
  return each([](auto a, auto b, auto c) { return vfmaq_f32(c, a, b); }, x, y, z);
}
inline F32 f_max(F32 x, F32 y) {  // y where either is NaN
  return each([](auto a, auto b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }, x, y);
}
inline F32 f_min(F32 x, F32 y) {  // y where either is NaN
  return each([](auto a, auto b) { return vbslq_f32(vcltq_f32(a, b), a, b); }, x, y);
}
inline F32 f_abs(F32 x) { return each([](auto a) { return vabsq_f32(a); }, x); }
inline F32 f_round(F32 x) { return each([](auto a) { return vrndnq_f32(a); }, x); }
// x * 2^exponent, for normal results.
inline F32 f_scale(F32 x, F32 exponent) {
  auto scale = [](auto a, auto n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
  };
  return each(scale, x, exponent);
}
// Lanes are added in the order of AVX2's halves, so that sums are the same there.
inline float f_sum(F32 x) {
  float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(vpadd_f32(two, two), 0);
}
inline float f_largest(F32 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.c), vmaxq_f32(x.b, x.d))); }
inline F32 f_from(I32 x) { return each([](auto a) { return vcvtq_f32_s32(a); }, x); }
inline float32x4_t load_half4(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline F32 f_load_half(const uint16_t* p) {
  return {load_half4(p), load_half4(p + 4), load_half4(p + 8), load_half4(p + 12)};
}
inline Four<uint16x4_t> load_u8(const uint8_t* p) {
  uint8x16_t bytes = vld1q_u8(p);
  uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)};
}
inline F32 f_load_u8(const uint8_t* p) {
  return each([](auto a) { return vcvtq_f32_u32(vmovl_u16(a)); }, load_u8(p));
}
inline float32x4_t load_bf16_4(const uint16_t* p) { return as_f(vshll_n_u16(vld1_u16(p), 16)); }
inline F32 f_load_bf16(const uint16_t* p) {
  return {load_bf16_4(p), load_bf16_4(p + 4), load_bf16_4(p + 8), load_bf16_4(p + 12)};
}
// The first `count` lanes of x, `other` in the rest.
inline F32 f_first(F32 x, int count, float other) {
  static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int32x4_t limit = vdupq_n_s32(count);
  float32x4_t rest = vdupq_n_f32(other);
  I32 lane = {vld1q_s32(lanes), vld1q_s32(lanes + 4), vld1q_s32(lanes + 8), vld1q_s32(lanes + 12)};
  return each([=](auto a, auto i) { return vbslq_f32(vcltq_s32(i, limit), a, rest); }, x, lane);
}

inline I32 i_set(int32_t x) { return same(vdupq_n_s32(x)); }
inline I32 i_add(I32 x, I32 y) { return each([](auto a, auto b) { return vaddq_s32(a, b); }, x, y); }
inline I32 i_round(F32 x) { return each([](auto a) { return vcvtnq_s32_f32(a); }, x); }
inline void i_store_s8(int8_t* p, I32 x) {
  int16x8_t low = vcombine_s16(vqmovn_s32(x.a), vqmovn_s32(x.b));
  int16x8_t high = vcombine_s16(vqmovn_s32(x.c), vqmovn_s32(x.d));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
// zeros[lane] * factor; factor fits in 16 bits.
inline I32 i_times_u8(const uint8_t* zeros, int32_t factor) {
  int16_t f = (int16_t)factor;
  return each([=](auto a) { return vmull_n_s16(vreinterpret_s16_u16(a), f); }, load_u8(zeros));
}

inline Bytes b_load(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}; }
inline void b_store(uint8_t* p, Bytes x) {
  vst1q_u8(p, x.a);
  vst1q_u8(p + 16, x.b);
  vst1q_u8(p + 32, x.c);
  vst1q_u8(p + 48, x.d);
}
inline Bytes b_low(Bytes x) { return each([](auto a) { return vandq_u8(a, vdupq_n_u8(15)); }, x); }
inline Bytes b_high(Bytes x) { return each([](auto a) { return vshrq_n_u8(a, 4); }, x); }
inline Bytes b_repeat(const uint8_t* p) { return same(vld1q_u8(p)); }  // 16 bytes, four times
inline Bytes b_lookup(Bytes table, Bytes codes) {  // codes of at most 15 in a table of 16 bytes
  return each([](auto t, auto c) { return vqtbl1q_u8(t, c); }, table, codes);
}
template <int Byte> inline F32 f_from_byte(Bytes x) {
  auto byte = [](auto a) {
    uint32x4_t high = vshlq_n_u32(as_u(a), 24 - 8 * Byte);
    return vcvtq_f32_u32(vshrq_n_u32(high, 24));
  };
  return each(byte, x);
}

inline Codes c_load(const int8_t* p) { return vld1_s8(p); }
// acc[lane] + the dot product of 4 unsigned weights with the same 4 signed activations in every lane: the first 4 of x
// or the last. There is a product of signed bytes only; weights of more than 7 bits are taken as code - kWideShift,
// which is the code with its highest bit turned over.
template <bool Wide, int Half> inline I32 dot4(I32 acc, Bytes w, Codes x) {
  auto dot = [=](auto sum, auto a) {
    if constexpr (Wide) a = veorq_u8(a, vdupq_n_u8(128));
    return vdotq_lane_s32(sum, vreinterpretq_s8_u8(a), x, Half);
  };
  return each(dot, acc, w);
}

inline Pairs p_load(const void* p) { return b_load((const uint8_t*)p); }
// Two float32 vectors whose values bfloat16 can hold, lane by lane into pairs: the upper half of `even` is shifted in
// below that of `odd`.
inline Pairs p_join(F32 even, F32 odd) {
  return each([](auto e, auto o) { return as_bytes(vsriq_n_u32(as_u(o), as_u(e), 16)); }, even, odd);
}
inline uint8x16_t load_s8_8(const int8_t* p) {
  int16x8_t wide = vmovl_s8(vld1_s8(p));
  float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
  return vreinterpretq_u8_u16(vcombine_u16(vshrn_n_u32(as_u(low), 16), vshrn_n_u32(as_u(high), 16)));
}
// 32 signed bytes, as pairs.
inline Pairs p_load_s8(const int8_t* p) {
  return {load_s8_8(p), load_s8_8(p + 8), load_s8_8(p + 16), load_s8_8(p + 24)};
}

// 16 FP8 (E4M3) values times 2^-8, exactly: 0eeeemmm shifted to a half's exponent and mantissa.
inline F32 f_load_fp8(const uint8_t* p) {
  auto half8 = [](const uint8_t* from) {
    uint16x8_t wide = vreinterpretq_u16_s16(vshll_n_s8(vld1_s8((const int8_t*)from), 7));
    return vreinterpretq_f16_u16(vandq_u16(wide, vdupq_n_u16(0xBFFF)));
  };
  float16x8_t low = half8(p), high = half8(p + 8);
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
          vcvt_high_f32_f16(high)};
}

// acc[lane] + the dot product of 2 weights with the same 2 activations in every lane.
inline F32 dot2(F32 acc, Pairs w, const uint16_t* x) {
  uint32_t two;
  memcpy(&two, x, 4);
  float32x2_t both = vget_low_f32(as_f(vshll_n_u16(vcreate_u16(two), 16)));
  auto dot = [=](auto sum, auto pair) {
    sum = vfmaq_lane_f32(sum, as_f(vshlq_n_u32(as_u(pair), 16)), both, 0);
    return vfmaq_lane_f32(sum, as_f(vandq_u32(as_u(pair), vdupq_n_u32(0xFFFF0000))), both, 1);
  };
  return each(dot, acc, w);
}
inline void f_store_bf16(uint16_t* p, F32 x) {
  auto rounded = [](auto a) {
    uint32x4_t bits = as_u(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), bits, vdupq_n_u32(0x7FC00000)), 16);
  };
  Four<uint16x4_t> words = each(rounded, x);
  vst1q_u16(p, vcombine_u16(words.a, words.b));
  vst1q_u16(p + 8, vcombine_u16(words.c, words.d));
}

}  // namespace NB_ISA

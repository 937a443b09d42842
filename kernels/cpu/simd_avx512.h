// Sixteen lanes at a time, for AVX-512 with VNNI, and with BF16 where NB_BF16 says so. One register holds sixteen.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace NB_ISA {

constexpr int kTiles = 2;         // tiles of 16 outputs that one inner loop works on
constexpr int kRows = 4;          // rows of activations that it works on: kTiles * kRows accumulators twice over
constexpr int kAccumulators = 8;  // sums of 16 lanes that it may keep
constexpr int kWideShift = 0;     // dot4 takes weights as they are

using F32 = __m512;            // 16 float32
using I32 = __m512i;           // 16 int32
using Bytes = __m512i;         // 16 lanes of 4 bytes
using Pairs = __m512i;         // 16 lanes of 2 bfloat16
using Codes = const int8_t*;   // 8 columns of one row's int8 activations

inline F32 f_zero() { return _mm512_setzero_ps(); }
inline F32 f_set(float x) { return _mm512_set1_ps(x); }
inline F32 f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 f_add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 f_sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 f_mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 f_div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 f_fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 f_max(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline F32 f_min(F32 a, F32 b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline F32 f_abs(F32 x) { return _mm512_abs_ps(x); }
inline F32 f_round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 f_scale(F32 x, F32 exponent) { return _mm512_scalef_ps(x, exponent); }  // x * 2^exponent
inline float f_sum(F32 x) { return _mm512_reduce_add_ps(x); }
inline float f_largest(F32 x) { return _mm512_reduce_max_ps(x); }
inline F32 f_from(I32 x) { return _mm512_cvtepi32_ps(x); }
inline F32 f_load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F32 f_load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F32 f_load_bf16(const uint16_t* p) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
// The first `count` lanes of x, `other` in the rest.
inline F32 f_first(F32 x, int count, float other) {
  __mmask16 mask = count >= 16 ? 0xFFFF : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
  return _mm512_mask_blend_ps(mask, _mm512_set1_ps(other), x);
}

inline I32 i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I32 i_add(I32 x, I32 y) { return _mm512_add_epi32(x, y); }
inline I32 i_round(F32 x) { return _mm512_cvtps_epi32(x); }
inline void i_store_s8(int8_t* p, I32 x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x)); }
// zeros[lane] * factor; factor fits in 16 bits.
inline I32 i_times_u8(const uint8_t* zeros, int32_t factor) {
  return _mm512_madd_epi16(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)zeros)),
                           _mm512_set1_epi32(factor & 0xFFFF));
}

inline Bytes b_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void b_store(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes b_low(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes b_high(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Bytes b_repeat(const uint8_t* p) {  // 16 bytes, four times
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
inline Bytes b_lookup(Bytes table, Bytes codes) {  // codes of at most 15 in a table of 16 bytes
  return _mm512_shuffle_epi8(table, codes);
}
template <int Byte> inline F32 f_from_byte(Bytes x) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 8 * Byte), _mm512_set1_epi32(255)));
}

inline Codes c_load(const int8_t* p) { return p; }
// acc[lane] + the dot product of 4 unsigned weights with the same 4 signed activations in every lane: the first 4 of x
// or the last. Weights of more than 7 bits are `Wide`; it makes no difference here.
template <bool Wide, int Half> inline I32 dot4(I32 acc, Bytes w, Codes x) {
  int32_t four;
  memcpy(&four, x + 4 * Half, 4);
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}

inline Pairs p_load(const void* p) { return _mm512_loadu_si512(p); }

// Two float32 vectors whose values bfloat16 can hold, lane by lane into pairs.
inline Pairs p_join(F32 even, F32 odd) {
  __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(0xFFFF0000)));
}

// 32 signed bytes, as pairs.
inline Pairs p_load_s8(const int8_t* p) {
  __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
  F32 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(wide, 16), 16));
  return p_join(even, _mm512_cvtepi32_ps(_mm512_srai_epi32(wide, 16)));
}

// 16 FP8 (E4M3) values times 2^-8, exactly: 0eeeemmm shifted to a half's exponent and mantissa.
inline F32 f_load_fp8(const uint8_t* p) {
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xBFFF));
  return _mm512_cvtph_ps(half);
}

#if NB_BF16
// acc[lane] + the dot product of 2 weights with the same 2 activations in every lane.
inline F32 dot2(F32 acc, Pairs w, const uint16_t* x) {
  int32_t two;
  memcpy(&two, x, 4);
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
}
inline void f_store_bf16(uint16_t* p, F32 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#else
inline F32 dot2(F32 acc, Pairs w, const uint16_t* x) {
  __m512i even = _mm512_set1_epi32((uint32_t)x[0] << 16), odd = _mm512_set1_epi32((uint32_t)x[1] << 16);
  F32 high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xFFFF0000)));
  acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(even), acc);
  return _mm512_fmadd_ps(high, _mm512_castsi512_ps(odd), acc);
}
inline void f_store_bf16(uint16_t* p, F32 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

}  // namespace NB_ISA

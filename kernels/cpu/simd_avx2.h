// Sixteen lanes at a time, for AVX2 with FMA and F16C, and with AVX-VNNI where NB_VNNI says so. Two registers hold
// sixteen.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace NB_ISA {

constexpr int kTiles = 1;         // tiles of 16 outputs that one inner loop works on
constexpr int kRows = 3;          // rows of activations that it works on
constexpr int kAccumulators = 8;  // sums of 16 lanes that it may keep
constexpr int kWideShift = 0;     // dot4 takes weights as they are

struct F32 { __m256 a, b; };   // 16 float32
struct I32 { __m256i a, b; };  // 16 int32
using Bytes = I32;             // 16 lanes of 4 bytes
using Pairs = I32;             // 16 lanes of 2 bfloat16
using Codes = const int8_t*;   // 8 columns of one row's int8 activations

inline __m256 as_f(__m256i x) { return _mm256_castsi256_ps(x); }
inline __m256i as_i(__m256 x) { return _mm256_castps_si256(x); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i load128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }

inline F32 f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32 f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F32 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F32 f_add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 f_sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 f_mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 f_div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 f_fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 f_max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where either is NaN
inline F32 f_min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }  // y where either is NaN
inline F32 f_abs(F32 x) {
  __m256 mask = as_f(_mm256_set1_epi32(0x7FFFFFFF));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline F32 f_round(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
// x * 2^exponent, for normal results.
inline F32 f_scale(F32 x, F32 exponent) {
  __m256i a = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent.a), 23);
  __m256i b = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent.b), 23);
  return {as_f(_mm256_add_epi32(as_i(x.a), a)), as_f(_mm256_add_epi32(as_i(x.b), b))};
}
inline float f_sum(F32 x) {
  __m256 half = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float f_largest(F32 x) {
  __m256 half = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline F32 f_from(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F32 f_load_half(const uint16_t* p) { return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}; }
inline F32 f_load_u8(const uint8_t* p) {
  return f_from({_mm256_cvtepu8_epi32(load64(p)), _mm256_cvtepu8_epi32(load64(p + 8))});
}
inline F32 f_load_bf16(const uint16_t* p) {
  __m256i a = _mm256_cvtepu16_epi32(load128(p)), b = _mm256_cvtepu16_epi32(load128(p + 8));
  return {as_f(_mm256_slli_epi32(a, 16)), as_f(_mm256_slli_epi32(b, 16))};
}
// The first `count` lanes of x, `other` in the rest.
inline F32 f_first(F32 x, int count, float other) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), limit = _mm256_set1_epi32(count);
  __m256 rest = _mm256_set1_ps(other);
  __m256i a = _mm256_cmpgt_epi32(limit, lane);
  __m256i b = _mm256_cmpgt_epi32(limit, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
  return {_mm256_blendv_ps(rest, x.a, as_f(a)), _mm256_blendv_ps(rest, x.b, as_f(b))};
}

inline I32 i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32 i_add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32 i_round(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline void i_store_s8(int8_t* p, I32 x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
// zeros[lane] * factor; factor fits in 16 bits.
inline I32 i_times_u8(const uint8_t* zeros, int32_t factor) {
  __m256i f = _mm256_set1_epi32(factor & 0xFFFF);
  return {_mm256_madd_epi16(_mm256_cvtepu8_epi32(load64(zeros)), f),
          _mm256_madd_epi16(_mm256_cvtepu8_epi32(load64(zeros + 8)), f)};
}

inline Bytes b_load(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
inline void b_store(uint8_t* p, Bytes x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline Bytes b_low(Bytes x) {
  __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes b_high(Bytes x) { return b_low({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline Bytes b_repeat(const uint8_t* p) {  // 16 bytes, four times
  __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {twice, twice};
}
inline Bytes b_lookup(Bytes table, Bytes codes) {  // codes of at most 15 in a table of 16 bytes
  return {_mm256_shuffle_epi8(table.a, codes.a), _mm256_shuffle_epi8(table.b, codes.b)};
}
template <int Byte> inline F32 f_from_byte(Bytes x) {
  __m256i mask = _mm256_set1_epi32(255);
  return f_from({_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * Byte), mask),
                 _mm256_and_si256(_mm256_srli_epi32(x.b, 8 * Byte), mask)});
}

#if NB_VNNI
template <bool Wide> inline __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(acc, w, x);
}
#else
// Products of adjacent bytes are summed in 16 bits, which weights of up to 7 bits cannot overflow. Wider ones go through
// 16-bit factors: even and odd bytes apart.
template <bool Wide> inline __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
  if constexpr (!Wide) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  } else {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
}
#endif
inline Codes c_load(const int8_t* p) { return p; }
// acc[lane] + the dot product of 4 unsigned weights with the same 4 signed activations in every lane: the first 4 of x
// or the last.
template <bool Wide, int Half> inline I32 dot4(I32 acc, Bytes w, Codes x) {
  int32_t four;
  memcpy(&four, x + 4 * Half, 4);
  __m256i same = _mm256_set1_epi32(four);
  return {dot4_half<Wide>(acc.a, w.a, same), dot4_half<Wide>(acc.b, w.b, same)};
}

inline Pairs p_load(const void* p) { return {load256(p), load256((const char*)p + 32)}; }
inline __m256i join_half(__m256 even, __m256 odd) {
  __m256i high = _mm256_and_si256(as_i(odd), _mm256_set1_epi32(0xFFFF0000));
  return _mm256_or_si256(_mm256_srli_epi32(as_i(even), 16), high);
}
// Two float32 vectors whose values bfloat16 can hold, lane by lane into pairs.
inline Pairs p_join(F32 even, F32 odd) { return {join_half(even.a, odd.a), join_half(even.b, odd.b)}; }
inline __m256i load_s8_half(const int8_t* p) {
  __m256i wide = _mm256_cvtepi8_epi16(load128(p));
  __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(wide, 16), 16));
  return join_half(even, _mm256_cvtepi32_ps(_mm256_srai_epi32(wide, 16)));
}
// 32 signed bytes, as pairs.
inline Pairs p_load_s8(const int8_t* p) { return {load_s8_half(p), load_s8_half(p + 16)}; }

// 16 FP8 (E4M3) values times 2^-8, exactly: 0eeeemmm shifted to a half's exponent and mantissa.
inline F32 f_load_fp8(const uint8_t* p) {
  __m256i wide = _mm256_cvtepi8_epi16(load128(p));
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xBFFF));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}

inline __m256 dot2_half(__m256 acc, __m256i w, __m256 even, __m256 odd) {
  acc = _mm256_fmadd_ps(as_f(_mm256_slli_epi32(w, 16)), even, acc);
  return _mm256_fmadd_ps(as_f(_mm256_and_si256(w, _mm256_set1_epi32(0xFFFF0000))), odd, acc);
}
// acc[lane] + the dot product of 2 weights with the same 2 activations in every lane.
inline F32 dot2(F32 acc, Pairs w, const uint16_t* x) {
  __m256 even = as_f(_mm256_set1_epi32((uint32_t)x[0] << 16)), odd = as_f(_mm256_set1_epi32((uint32_t)x[1] << 16));
  return {dot2_half(acc.a, w.a, even, odd), dot2_half(acc.b, w.b, even, odd)};
}
inline __m256i bf16_half(__m256 x) {
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(as_i(x), 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(as_i(x), _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  __m256 broken = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(as_i(_mm256_blendv_ps(as_f(rounded), as_f(_mm256_set1_epi32(0x7FC00000)), broken)), 16);
}
inline void f_store_bf16(uint16_t* p, F32 x) {
  __m256i words = _mm256_packus_epi32(bf16_half(x.a), bf16_half(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(words, 0xD8));
}

}  // namespace NB_ISA

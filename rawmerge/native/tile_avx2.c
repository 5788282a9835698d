/* Tiles with AVX2, FMA and F16C: 8 floats or 4 doubles at a time. */
#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET target("avx2,fma,f16c")
#define STRIP_ROWS 48

#define NAME(x) x##_float_avx2
#define FN static inline __attribute__((always_inline, TARGET))
#define OUTER __attribute__((TARGET))
#define REAL float
#define VEC __m256
#define LANES 8
#define ROWS 6
#define VECS 2
#define v_zero _mm256_setzero_ps
#define v_set1 _mm256_set1_ps
#define v_load _mm256_loadu_ps
#define v_fma _mm256_fmadd_ps
#define v_mul _mm256_mul_ps
#define v_add _mm256_add_ps

struct state_float_avx2 {
    __m256i highest; /* absolute value, as bits */
    int changed;
};

FN __m256 load_float_avx2(const void *at, int dtype) {
    if (dtype == F32) return _mm256_loadu_ps(at);
    const __m128i stored = _mm_loadu_si128(at);
    if (dtype == F16) return _mm256_cvtph_ps(stored);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16));
}

/* The higher half of each element, rounded to the nearest, ties to even. */
FN __m128i bfloat_avx2(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8));
}

FN void store_float_avx2(void *at, __m256 values, int dtype, struct state_float_avx2 *state) {
    const __m256i bits = _mm256_castps_si256(values);
    state->highest = _mm256_max_epu32(state->highest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    if (dtype == F32)
        _mm256_storeu_ps(at, values);
    else if (dtype == F16)
        _mm_storeu_si128(at, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
        _mm_storeu_si128(at, bfloat_avx2(bits));
}

FN struct state_float_avx2 begin_float_avx2(int changed) {
    return (struct state_float_avx2){_mm256_setzero_si256(), changed};
}

FN int unequal_float_avx2(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }

FN int needs_care_float_avx2(const struct state_float_avx2 *state, int dtype) {
    uint32_t highest[8];
    _mm256_storeu_si256((__m256i *)highest, state->highest);
    return any_extreme(highest, NULL, 8, dtype);
}

#include "tile_body.h"

#define NAME(x) x##_double_avx2
#define FN static inline __attribute__((always_inline, TARGET))
#define OUTER __attribute__((TARGET))
#define REAL double
#define VEC __m256d
#define LANES 4
#define ROWS 4
#define VECS 2
#define v_zero _mm256_setzero_pd
#define v_set1 _mm256_set1_pd
#define v_load _mm256_loadu_pd
#define v_fma _mm256_fmadd_pd
#define v_mul _mm256_mul_pd
#define v_add _mm256_add_pd

struct state_double_avx2 {
    __m128i highest; /* absolute value rounded to float, as bits */
    __m128i lowest;  /* the same less one, so that zero is the highest */
    int changed;
};

FN __m256d load_double_avx2(const void *at, int dtype) {
    if (dtype == F32) return _mm256_cvtps_pd(_mm_loadu_ps(at));
    const __m128i stored = _mm_loadl_epi64(at);
    if (dtype == F16) return _mm256_cvtps_pd(_mm_cvtph_ps(stored));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(stored), 16)));
}

/* To float, the last bit odd where inexact, so that the next rounding gives what rounding once would give. */
FN __m128 odd_double_avx2(__m256d values) {
    const __m256i bits = _mm256_castpd_si256(values), low = _mm256_set1_epi64x(0x1fffffff);
    const __m256i exact = _mm256_cmpeq_epi64(_mm256_and_si256(bits, low), _mm256_setzero_si256());
    const __m256i last = _mm256_andnot_si256(exact, _mm256_set1_epi64x(0x20000000));
    return _mm256_cvtpd_ps(_mm256_castsi256_pd(_mm256_or_si256(_mm256_andnot_si256(low, bits), last)));
}

FN void store_double_avx2(void *at, __m256d values, int dtype, struct state_double_avx2 *state) {
    const __m128 nearest = dtype == F32 ? _mm256_cvtpd_ps(values) : odd_double_avx2(values);
    const __m128i bits = _mm_castps_si128(nearest);
    const __m128i absolute = _mm_and_si128(bits, _mm_set1_epi32(0x7fffffff));
    state->highest = _mm_max_epu32(state->highest, absolute);
    if (dtype == F32) {
        _mm_storeu_ps(at, nearest);
        return;
    }
    state->lowest = _mm_min_epu32(state->lowest, _mm_sub_epi32(absolute, _mm_set1_epi32(1)));
    if (dtype == F16)
        _mm_storel_epi64(at, _mm_cvtps_ph(nearest, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
        _mm_storel_epi64(at, bfloat_avx2(_mm256_castsi128_si256(bits)));
}

FN struct state_double_avx2 begin_double_avx2(int changed) {
    return (struct state_double_avx2){_mm_setzero_si128(), _mm_set1_epi32(-1), changed};
}

FN int unequal_double_avx2(__m256d a, __m256d b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_NEQ_UQ)) != 0; }

FN int needs_care_double_avx2(const struct state_double_avx2 *state, int dtype) {
    uint32_t highest[4], lowest[4];
    _mm_storeu_si128((__m128i *)highest, state->highest);
    _mm_storeu_si128((__m128i *)lowest, state->lowest);
    return any_extreme(highest, lowest, 4, dtype);
}

#include "tile_body.h"

#endif

/* Tiles with AVX-512: 16 floats or 8 doubles at a time. */
#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define STRIP_ROWS 48

/* What is summed over elements of a sampled row, 8 at a time. */
struct sums_avx512 {
    __m512d delta, applied, error;
    int touched, changed;
};

static inline __attribute__((always_inline, TARGET)) void add_avx512(struct sums_avx512 *sums, __m512d delta,
                                                                     __m512d applied) {
    const __m512d error = _mm512_sub_pd(applied, delta);
    sums->delta = _mm512_fmadd_pd(delta, delta, sums->delta);
    sums->applied = _mm512_fmadd_pd(applied, applied, sums->applied);
    sums->error = _mm512_fmadd_pd(error, error, sums->error);
}

static inline __attribute__((always_inline, TARGET)) void end_avx512(const struct sums_avx512 *sums, double *row) {
    row[0] += sums->touched, row[1] += sums->changed;
    row[2] += _mm512_reduce_add_pd(sums->delta);
    row[3] += _mm512_reduce_add_pd(sums->applied);
    row[4] += _mm512_reduce_add_pd(sums->error);
}

#define NAME(x) x##_float_avx512
#define FN static inline __attribute__((always_inline, TARGET))
#define OUTER __attribute__((TARGET))
#define REAL float
#define VEC __m512
#define LANES 16
#define ROWS 4
#define VECS 4
#define v_zero _mm512_setzero_ps
#define v_set1 _mm512_set1_ps
#define v_load _mm512_loadu_ps
#define v_fma _mm512_fmadd_ps
#define v_mul _mm512_mul_ps
#define v_add _mm512_add_ps
#define v_sub _mm512_sub_ps
#define v_store _mm512_storeu_ps
#define SET(x) x##_avx512

struct state_float_avx512 {
    __m512i highest; /* absolute value, as bits */
    __m256i stored;  /* absolute value as stored in two bytes, as bits */
    int changed;
};

FN __m512 load_float_avx512(const void *at, int dtype) {
    if (dtype == F32) return _mm512_loadu_ps(at);
    const __m256i stored = _mm256_loadu_si256(at);
    if (dtype == F16) return _mm512_cvtph_ps(stored);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
}

FN void watch_float_avx512(__m512 values, struct state_float_avx512 *state) {
    const __m512i absolute = _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fffffff));
    state->highest = _mm512_max_epu32(state->highest, absolute);
}

/* The bits of which the higher half is the nearest bfloat, ties to even. */
FN __m512i bfloat_avx512(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values), half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    return _mm512_mask_add_epi32(half, is_odd, half, _mm512_set1_epi32(1));
}

FN __m512 rounded_float_avx512(__m512 values, int dtype, struct state_float_avx512 *state) {
    (void)state;
    if (dtype == F32) return values;
    if (dtype == F16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm512_castsi512_ps(_mm512_and_si512(bfloat_avx512(values), _mm512_set1_epi32(0xffff0000)));
}

FN void store_float_avx512(void *at, __m512 values, int dtype, struct state_float_avx512 *state) {
    if (dtype == F32) {
        watch_float_avx512(values, state);
        _mm512_storeu_ps(at, values);
        return;
    }
    const __m256i stored = dtype == F16
                               ? _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                               : _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat_avx512(values), 16));
    state->stored = _mm256_max_epu16(state->stored, _mm256_and_si256(stored, _mm256_set1_epi16(0x7fff)));
    _mm256_storeu_si256(at, stored);
}

FN struct state_float_avx512 begin_float_avx512(int changed) {
    return (struct state_float_avx512){_mm512_setzero_si512(), _mm256_setzero_si256(), changed};
}

FN int unequal_float_avx512(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }

FN int needs_care_float_avx512(const struct state_float_avx512 *state, int dtype) {
    const __m512i stored = _mm512_cvtepu16_epi32(state->stored);
    const int is_infinite = dtype != F32 && _mm512_reduce_max_epu32(stored) >= (dtype == F16 ? 0x7c00u : 0x7f80u);
    return is_infinite || _mm512_reduce_max_epu32(state->highest) >= too_high(dtype);
}

FN void add_float_avx512(struct sums_avx512 *sums, __m512 delta, __m512 old, __m512 now) {
    const __m256 old_high = _mm512_extractf32x8_ps(old, 1), now_high = _mm512_extractf32x8_ps(now, 1);
    sums->touched += __builtin_popcount(_mm512_cmp_ps_mask(delta, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    sums->changed += __builtin_popcount(_mm512_cmp_ps_mask(now, old, _CMP_NEQ_UQ));
    const __m512d low = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(now)),
                                      _mm512_cvtps_pd(_mm512_castps512_ps256(old)));
    const __m512d high = _mm512_sub_pd(_mm512_cvtps_pd(now_high), _mm512_cvtps_pd(old_high));
    add_avx512(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(delta)), low);
    add_avx512(sums, _mm512_cvtps_pd(_mm512_extractf32x8_ps(delta, 1)), high);
}

#include "tile_body.h"

#define NAME(x) x##_double_avx512
#define FN static inline __attribute__((always_inline, TARGET))
#define OUTER __attribute__((TARGET))
#define REAL double
#define VEC __m512d
#define LANES 8
#define ROWS 4
#define VECS 4
#define v_zero _mm512_setzero_pd
#define v_set1 _mm512_set1_pd
#define v_load _mm512_loadu_pd
#define v_fma _mm512_fmadd_pd
#define v_mul _mm512_mul_pd
#define v_add _mm512_add_pd
#define v_sub _mm512_sub_pd
#define v_store _mm512_storeu_pd
#define SET(x) x##_avx512

struct state_double_avx512 {
    __m256i highest; /* absolute value rounded to float, as bits */
    __m256i lowest;  /* the same less one, so that zero is the highest */
    int changed;
};

FN __m512d load_double_avx512(const void *at, int dtype) {
    if (dtype == F32) return _mm512_cvtps_pd(_mm256_loadu_ps(at));
    const __m128i stored = _mm_loadu_si128(at);
    if (dtype == F16) return _mm512_cvtps_pd(_mm256_cvtph_ps(stored));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(stored), 16)));
}

/* To float, the last bit odd where inexact, so that the next rounding gives what rounding once would give. */
FN __m256 odd_double_avx512(__m512d values) {
    const __m512i bits = _mm512_castpd_si512(values), low = _mm512_set1_epi64(0x1fffffff);
    const __mmask8 inexact = _mm512_test_epi64_mask(bits, low);
    const __m512i cut = _mm512_andnot_si512(low, bits);
    return _mm512_cvtpd_ps(
        _mm512_castsi512_pd(_mm512_mask_or_epi64(cut, inexact, cut, _mm512_set1_epi64(0x20000000))));
}

FN void store_double_avx512(void *at, __m512d values, int dtype, struct state_double_avx512 *state) {
    const __m256 nearest = dtype == F32 ? _mm512_cvtpd_ps(values) : odd_double_avx512(values);
    const __m256i bits = _mm256_castps_si256(nearest);
    const __m256i absolute = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    state->highest = _mm256_max_epu32(state->highest, absolute);
    if (dtype == F32) {
        _mm256_storeu_ps(at, nearest);
        return;
    }
    state->lowest = _mm256_min_epu32(state->lowest, _mm256_sub_epi32(absolute, _mm256_set1_epi32(1)));
    if (dtype == F16) {
        _mm_storeu_si128(at, _mm256_cvtps_ph(nearest, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        _mm_storeu_si128(at, _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_add_epi32(bits, half), 16)));
    }
}

FN void watch_double_avx512(__m512d values, struct state_double_avx512 *state) { (void)values, (void)state; }

FN __m512d rounded_double_avx512(__m512d values, int dtype, struct state_double_avx512 *state) {
    char stored[64];
    store_double_avx512(stored, values, dtype, state);
    return load_double_avx512(stored, dtype);
}

FN struct state_double_avx512 begin_double_avx512(int changed) {
    return (struct state_double_avx512){_mm256_setzero_si256(), _mm256_set1_epi32(-1), changed};
}

FN int unequal_double_avx512(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_NEQ_UQ) != 0; }

FN int needs_care_double_avx512(const struct state_double_avx512 *state, int dtype) {
    uint32_t highest[8], lowest[8];
    _mm256_storeu_si256((__m256i *)highest, state->highest);
    _mm256_storeu_si256((__m256i *)lowest, state->lowest);
    return any_extreme(highest, lowest, 8, dtype);
}

FN void add_double_avx512(struct sums_avx512 *sums, __m512d delta, __m512d old, __m512d now) {
    sums->touched += __builtin_popcount(_mm512_cmp_pd_mask(delta, _mm512_setzero_pd(), _CMP_NEQ_UQ));
    sums->changed += __builtin_popcount(_mm512_cmp_pd_mask(now, old, _CMP_NEQ_UQ));
    add_avx512(sums, delta, _mm512_sub_pd(now, old));
}

#include "tile_body.h"

#endif

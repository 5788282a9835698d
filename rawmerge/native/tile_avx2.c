/* Tiles with AVX2, FMA and F16C: 8 floats or 4 doubles at a time. */
#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET target("avx2,fma,f16c")
#define STRIP_ROWS 48

/* What is summed over elements of a sampled row, 4 at a time. */
struct sums_avx2 {
    __m256d delta, applied, error;
    int touched, changed;
};

static inline __attribute__((always_inline, TARGET)) void add_avx2(struct sums_avx2 *sums, __m256d delta,
                                                                   __m256d applied) {
    const __m256d error = _mm256_sub_pd(applied, delta);
    sums->delta = _mm256_fmadd_pd(delta, delta, sums->delta);
    sums->applied = _mm256_fmadd_pd(applied, applied, sums->applied);
    sums->error = _mm256_fmadd_pd(error, error, sums->error);
}

static inline __attribute__((always_inline, TARGET)) double total_avx2(__m256d values) {
    const __m128d pairs = _mm_add_pd(_mm256_castpd256_pd128(values), _mm256_extractf128_pd(values, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pairs, _mm_unpackhi_pd(pairs, pairs)));
}

static inline __attribute__((always_inline, TARGET)) void end_avx2(const struct sums_avx2 *sums, double *row) {
    row[0] += sums->touched, row[1] += sums->changed;
    row[2] += total_avx2(sums->delta);
    row[3] += total_avx2(sums->applied);
    row[4] += total_avx2(sums->error);
}

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
#define v_sub _mm256_sub_ps
#define v_store _mm256_storeu_ps
#define SET(x) x##_avx2

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

/* Storing watches all that there is. */
FN void watch_float_avx2(__m256 values, struct state_float_avx2 *state) { (void)values, (void)state; }

FN __m256 rounded_float_avx2(__m256 values, int dtype, struct state_float_avx2 *state) {
    (void)state;
    if (dtype == F32) return values;
    if (dtype == F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(half, _mm256_set1_epi32(0xffff0000)));
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

FN void add_float_avx2(struct sums_avx2 *sums, __m256 delta, __m256 old, __m256 now) {
    const __m128 old_high = _mm256_extractf128_ps(old, 1), now_high = _mm256_extractf128_ps(now, 1);
    const __m256 touched = _mm256_cmp_ps(delta, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    sums->touched += __builtin_popcount(_mm256_movemask_ps(touched));
    sums->changed += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(now, old, _CMP_NEQ_UQ)));
    const __m256d low = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(now)),
                                      _mm256_cvtps_pd(_mm256_castps256_ps128(old)));
    const __m256d high = _mm256_sub_pd(_mm256_cvtps_pd(now_high), _mm256_cvtps_pd(old_high));
    add_avx2(sums, _mm256_cvtps_pd(_mm256_castps256_ps128(delta)), low);
    add_avx2(sums, _mm256_cvtps_pd(_mm256_extractf128_ps(delta, 1)), high);
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
#define v_sub _mm256_sub_pd
#define v_store _mm256_storeu_pd
#define SET(x) x##_avx2

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

FN void watch_double_avx2(__m256d values, struct state_double_avx2 *state) { (void)values, (void)state; }

FN __m256d rounded_double_avx2(__m256d values, int dtype, struct state_double_avx2 *state) {
    char stored[32];
    store_double_avx2(stored, values, dtype, state);
    return load_double_avx2(stored, dtype);
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

FN void add_double_avx2(struct sums_avx2 *sums, __m256d delta, __m256d old, __m256d now) {
    const __m256d touched = _mm256_cmp_pd(delta, _mm256_setzero_pd(), _CMP_NEQ_UQ);
    sums->touched += __builtin_popcount(_mm256_movemask_pd(touched));
    sums->changed += __builtin_popcount(_mm256_movemask_pd(_mm256_cmp_pd(now, old, _CMP_NEQ_UQ)));
    add_avx2(sums, delta, _mm256_sub_pd(now, old));
}

#include "tile_body.h"

#endif

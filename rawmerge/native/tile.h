/* What the instruction sets' files share: one tile of rows to merge, and the element types it may be stored in. */
#ifndef RAWMERGE_TILE_H
#define RAWMERGE_TILE_H

#include <stddef.h>
#include <stdint.h>

enum dtype { BF16 = 0, F16 = 1, F32 = 2 };

/* Columns of a packed right factor that lie together, for every instruction set and both precisions. */
#define PANEL 64

/* What merging a tile found out. */
#define CHANGED 1 /* an element differs from what it was */
#define CARE 2    /* a value is not finite, overflows, or cannot be rounded here; the result is of no use */

/* What is summed over a sampled row, in this order: elements whose delta D is not 0, elements whose stored value
   changes, D^2, (stored change)^2, (stored change - D)^2. */
#define SUMS 5

/* Two factors and their product's scale, `(left @ right) * scale`, element by element:
   the product is a chain of fused multiply-adds over k, in blocks of `block`, whose sums are added up in order. */
struct pair {
    const void *left;  /* (rows, rank), float or double */
    const void *right; /* (panels, rank, PANEL), float or double, padded with zeros */
    ptrdiff_t rank, block;
    double scale;
    int rounds_delta; /* whether the scaled product is rounded to out_dtype before it is added */
    double *sums;     /* (sampled rows of the tensor, SUMS); row r is the r / stride-th, if stride divides it; or none */
};

/* out = round(in + pair + pair ...); or, with rounds_between, round(round(in + pair) + pair) and so on. */
struct tile {
    const void *in; /* (rows, columns), stored */
    void *out;      /* (rows, columns); may be `in` where both have the same size of element */
    const struct pair *pairs;
    ptrdiff_t pair_count, rows, columns;
    int in_dtype, out_dtype;
    int rounds_between;      /* what is summed is then what one pair does; else what all do, and is the last one's */
    int finds_changes;
    ptrdiff_t first, stride; /* number of the tile's first row in the tensor; stride 0: no row is sampled */
};

typedef int merge_tile(const struct tile *);

merge_tile merge_float_avx512, merge_double_avx512, merge_float_avx2, merge_double_avx2;

/* The sums of a tile's sampled rows, which others have merged from `in` to `out`; given what was rounded, (rows,
   columns) of float or double. */
typedef void measure_tile(const struct tile *, const void *);

measure_tile measure_rows_float_avx512, measure_rows_double_avx512, measure_rows_float_avx2, measure_rows_double_avx2;

/* Bits of the lowest absolute float that is stored as infinity, or is no number. */
static inline uint32_t too_high(int dtype) {
    return dtype == BF16 ? 0x7f7f8000u : dtype == F16 ? 0x477ff000u : 0x7f800000u;
}

/* Whether one is too high, or, among `lowest` (absolute bits less one), a subnormal float that was rounded before. */
static inline int any_extreme(const uint32_t *highest, const uint32_t *lowest, int count, int dtype) {
    for (int i = 0; i < count; i++) {
        if (highest[i] >= too_high(dtype)) return 1;
        if (lowest && dtype != F32 && lowest[i] < 0x007fffffu) return 1;
    }
    return 0;
}

/* The tile's first sampled row from `row` on. */
static inline ptrdiff_t next_sampled(const struct tile *tile, ptrdiff_t row) {
    if (!tile->stride) return PTRDIFF_MAX;
    const ptrdiff_t past = (tile->first + row) % tile->stride;
    return past ? row + tile->stride - past : row;
}

static inline size_t dtype_size(int dtype) { return dtype == F32 ? 4 : 2; }

#endif

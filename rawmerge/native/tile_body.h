/* The tile's loops, included once per instruction set and precision, over the vectors that the including file defines:

   NAME(x)                   x with the set's suffix
   FN                        attributes of an inlined function
   REAL, VEC, LANES          element of the factors, vector of it, and how many it has
   ROWS, VECS                rows and vectors of one block held in registers
   v_zero v_set1 v_load v_fma v_mul v_add
   NAME(load)(pointer, dtype)                  stored elements, widened exactly
   NAME(store)(pointer, vector, dtype, state)  rounded once and stored; the state remembers what may overflow
   NAME(unequal)(vector, vector)               whether an element differs, NaN from everything
   NAME(state), NAME(begin)(changed)           what is remembered, and at first
   NAME(needs_care)(state, dtype)              whether the result is of no use
*/

#define BLOCK_COLUMNS (VECS * LANES)

struct NAME(registers) {
    VEC sum[ROWS][VECS];
};

/* sum = left[rows, from:to] @ right[from:to, columns], as one chain */
FN void NAME(chain)(VEC (*sum)[VECS], const REAL *left, ptrdiff_t rank, const REAL *right, ptrdiff_t from,
                    ptrdiff_t to, const int rows) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) sum[r][v] = v_zero();
    for (ptrdiff_t k = from; k < to; k++) {
        VEC right_k[VECS];
        for (int v = 0; v < VECS; v++) right_k[v] = v_load(right + k * PANEL + v * LANES);
        for (int r = 0; r < rows; r++) {
            VEC left_k = v_set1(left[r * rank + k]);
            for (int v = 0; v < VECS; v++) sum[r][v] = v_fma(left_k, right_k[v], sum[r][v]);
        }
    }
}

FN VEC NAME(round)(VEC values, int dtype, struct NAME(state) *state) {
    char stored[4 * LANES];
    NAME(store)(stored, values, dtype, state);
    return NAME(load)(stored, dtype);
}

/* Whether stored elements differ from what `before` would be stored as. */
FN int NAME(differ)(const char *stored, VEC before, int dtype) {
    struct NAME(state) ignored = NAME(begin)(0);
    return NAME(unequal)(NAME(load)(stored, dtype), NAME(round)(before, dtype, &ignored));
}

/* One block of rows x BLOCK_COLUMNS. `stride` is the distance between rows of `in` and `out` in elements. */
FN void NAME(block)(const struct tile *tile, const char *in, char *out, ptrdiff_t stride, const REAL *left,
                    const REAL *right, struct NAME(state) *state, const int rows, const int in_dtype,
                    const int out_dtype) {
    struct NAME(registers) now, total;
    const ptrdiff_t rank = tile->rank, first = tile->block < rank ? tile->block : rank;
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    const VEC scale = v_set1((REAL)tile->scale);
    NAME(chain)(now.sum, left, rank, right, 0, first, rows);
    for (ptrdiff_t from = first; from < rank; from += tile->block) {
        const ptrdiff_t to = from + tile->block < rank ? from + tile->block : rank;
        total = now;
        NAME(chain)(now.sum, left, rank, right, from, to, rows);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECS; v++) now.sum[r][v] = v_add(total.sum[r][v], now.sum[r][v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) {
            const ptrdiff_t at = r * stride + v * LANES;
            VEC before = NAME(load)(in + at * in_size, in_dtype);
            VEC delta = v_mul(now.sum[r][v], scale);
            if (tile->delta_dtype >= 0) delta = NAME(round)(delta, tile->delta_dtype, state);
            NAME(store)(out + at * out_size, v_add(before, delta), out_dtype, state);
            if (!state->changed) state->changed = NAME(differ)(out + at * out_size, before, out_dtype);
        }
}

/* A block at the tile's right edge, by way of rows that are wide enough. */
FN void NAME(edge)(const struct tile *tile, const char *in, char *out, ptrdiff_t width, const REAL *left,
                   const REAL *right, struct NAME(state) *state, const int in_dtype, const int out_dtype) {
    char wide_in[4 * BLOCK_COLUMNS] = {0}, wide_out[4 * BLOCK_COLUMNS];
    memcpy(wide_in, in, width * dtype_size(in_dtype));
    NAME(block)(tile, wide_in, wide_out, BLOCK_COLUMNS, left, right, state, 1, in_dtype, out_dtype);
    memcpy(out, wide_out, width * dtype_size(out_dtype));
}

FN void NAME(column)(const struct tile *tile, ptrdiff_t column, ptrdiff_t first, ptrdiff_t last,
                     struct NAME(state) *state, const int in_dtype, const int out_dtype) {
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    const ptrdiff_t width = tile->columns - column;
    const REAL *right = (const REAL *)tile->right + column / PANEL * PANEL * tile->rank + column % PANEL;
    ptrdiff_t row = first;
    while (row < last) {
        const ptrdiff_t at = row * tile->columns + column;
        const char *in = (const char *)tile->in + at * in_size;
        char *out = (char *)tile->out + at * out_size;
        const REAL *left = (const REAL *)tile->left + row * tile->rank;
        if (width < BLOCK_COLUMNS) {
            NAME(edge)(tile, in, out, width, left, right, state, in_dtype, out_dtype);
            row += 1;
        } else if (row + ROWS <= last) {
            NAME(block)(tile, in, out, tile->columns, left, right, state, ROWS, in_dtype, out_dtype);
            row += ROWS;
        } else {
            NAME(block)(tile, in, out, tile->columns, left, right, state, 1, in_dtype, out_dtype);
            row += 1;
        }
    }
}

/* Rows go by in strips that stay in the cache while the right factor passes once per strip. */
FN int NAME(strips)(const struct tile *tile, const int in_dtype, const int out_dtype) {
    struct NAME(state) state = NAME(begin)(!tile->finds_changes);
    for (ptrdiff_t first = 0; first < tile->rows; first += STRIP_ROWS) {
        const ptrdiff_t last = first + STRIP_ROWS < tile->rows ? first + STRIP_ROWS : tile->rows;
        for (ptrdiff_t column = 0; column < tile->columns; column += BLOCK_COLUMNS)
            NAME(column)(tile, column, first, last, &state, in_dtype, out_dtype);
    }
    return (state.changed ? CHANGED : 0) | (NAME(needs_care)(&state, out_dtype) ? CARE : 0);
}

OUTER int NAME(merge)(const struct tile *tile) {
    if (tile->in_dtype == BF16 && tile->out_dtype == BF16) return NAME(strips)(tile, BF16, BF16);
    if (tile->in_dtype == F16 && tile->out_dtype == F16) return NAME(strips)(tile, F16, F16);
    if (tile->in_dtype == F32 && tile->out_dtype == F32) return NAME(strips)(tile, F32, F32);
    return NAME(strips)(tile, tile->in_dtype, tile->out_dtype);
}

#undef BLOCK_COLUMNS
#undef NAME
#undef FN
#undef OUTER
#undef REAL
#undef VEC
#undef LANES
#undef ROWS
#undef VECS
#undef v_zero
#undef v_set1
#undef v_load
#undef v_fma
#undef v_mul
#undef v_add

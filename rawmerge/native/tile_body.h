/* The tile's loops, included once per instruction set and precision, over the vectors that the including file defines:

   NAME(x)                   x with the set's suffix
   FN                        attributes of an inlined function
   REAL, VEC, LANES          element of the factors, vector of it, and how many it has
   ROWS, VECS                rows and vectors of one block held in registers
   v_zero v_set1 v_load v_store v_fma v_mul v_add v_sub
   NAME(load)(pointer, dtype)                  stored elements, widened exactly
   NAME(store)(pointer, vector, dtype, state)  rounded once and stored; the state remembers what may overflow
   NAME(rounded)(vector, dtype)                rounded once, and widened again; what overflows becomes infinite
   NAME(watch)(vector, state)                  remembers what storing may hide: the payload of a base's NaN may carry
   NAME(unequal)(vector, vector)               whether an element differs, NaN from everything
   NAME(state), NAME(begin)(changed)           what is remembered, and at first
   NAME(needs_care)(state, dtype)              whether the result is of no use
   SET(x)                                      x with the instruction set's suffix, for what both precisions share
   NAME(add)(sums, vector, vector, vector)     adds D, by what is stored of the base and of the result
   SET(sums), SET(end)(sums, row)              sums of some elements; adds them to their row's
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

/* One row of a block: the base's values, and what the one rounding gets less them. */
struct NAME(line) {
    REAL before[BLOCK_COLUMNS], delta[BLOCK_COLUMNS];
};

/* Add a sampled row's part in a block, which is stored at `out`, to its sums; they begin with the first column.
   Where a block is padded, 0 has become 0, and nothing is added. */
OUTER static __attribute__((noinline)) void NAME(measure)(const struct NAME(line) *line, const char *out,
                                                          double *row, int is_first, int in_dtype, int out_dtype) {
    struct NAME(state) ignored = NAME(begin)(0);
    struct SET(sums) sums;
    memset(&sums, 0, sizeof sums);
    if (is_first) memset(row, 0, SUMS * sizeof *row);
    for (int v = 0; v < VECS; v++) {
        VEC old = v_load(line->before + v * LANES);
        if (in_dtype != out_dtype) old = NAME(round)(old, out_dtype, &ignored);
        VEC now = NAME(load)(out + v * LANES * dtype_size(out_dtype), out_dtype);
        NAME(add)(&sums, v_load(line->delta + v * LANES), old, now);
    }
    SET(end)(&sums, row);
}

/* Where a block lies: its first row and column in the tile, and the rows of it that are sampled, as bits. */
struct NAME(place) {
    ptrdiff_t row, column;
    unsigned sampled;
};

/* One block of rows x BLOCK_COLUMNS. `stride` is the distance between rows of `in` and `out` in elements. */
FN void NAME(block)(const struct tile *tile, const char *in, char *out, ptrdiff_t stride, const REAL *left,
                    const REAL *right, struct NAME(state) *state, struct NAME(place) place, const int rows,
                    const int in_dtype, const int out_dtype) {
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
    for (int r = 0; r < rows; r++) {
        struct NAME(line) line;
        const int is_sampled = place.sampled >> r & 1;
        for (int v = 0; v < VECS; v++) {
            const ptrdiff_t at = r * stride + v * LANES;
            VEC before = NAME(load)(in + at * in_size, in_dtype);
            VEC delta = v_mul(now.sum[r][v], scale);
            if (tile->delta_dtype >= 0) delta = NAME(rounded)(delta, out_dtype);
            VEC after = v_add(before, delta);
            if (in_dtype != out_dtype) NAME(watch)(after, state);
            if (is_sampled) {
                v_store(line.before + v * LANES, before);
                v_store(line.delta + v * LANES, v_sub(after, before));
            }
            NAME(store)(out + at * out_size, after, out_dtype, state);
            if (!state->changed) state->changed = NAME(differ)(out + at * out_size, before, out_dtype);
        }
        if (is_sampled) {
            double *row = tile->sums + (tile->first + place.row + r) / tile->stride * SUMS;
            NAME(measure)(&line, out + r * stride * out_size, row, place.column == 0, in_dtype, out_dtype);
        }
    }
}

/* A block at the tile's right edge, by way of rows that are wide enough. */
FN void NAME(edge)(const struct tile *tile, const char *in, char *out, ptrdiff_t width, const REAL *left,
                   const REAL *right, struct NAME(state) *state, struct NAME(place) place, const int in_dtype,
                   const int out_dtype) {
    char wide_in[4 * BLOCK_COLUMNS] = {0}, wide_out[4 * BLOCK_COLUMNS];
    memcpy(wide_in, in, width * dtype_size(in_dtype));
    NAME(block)(tile, wide_in, wide_out, BLOCK_COLUMNS, left, right, state, place, 1, in_dtype, out_dtype);
    memcpy(out, wide_out, width * dtype_size(out_dtype));
}

FN void NAME(column)(const struct tile *tile, ptrdiff_t column, ptrdiff_t first, ptrdiff_t last,
                     struct NAME(state) *state, const int in_dtype, const int out_dtype) {
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    const ptrdiff_t width = tile->columns - column;
    const REAL *right = (const REAL *)tile->right + column / PANEL * PANEL * tile->rank + column % PANEL;
    ptrdiff_t row = first, next = next_sampled(tile, first);
    while (row < last) {
        const int rows = width >= BLOCK_COLUMNS && row + ROWS <= last ? ROWS : 1;
        struct NAME(place) place = {row, column, 0};
        const ptrdiff_t at = row * tile->columns + column;
        const char *in = (const char *)tile->in + at * in_size;
        char *out = (char *)tile->out + at * out_size;
        const REAL *left = (const REAL *)tile->left + row * tile->rank;
        for (; next < row + rows; next += tile->stride) place.sampled |= 1u << (next - row);
        if (width < BLOCK_COLUMNS)
            NAME(edge)(tile, in, out, width, left, right, state, place, in_dtype, out_dtype);
        else if (rows == 1)
            NAME(block)(tile, in, out, tile->columns, left, right, state, place, 1, in_dtype, out_dtype);
        else if (place.sampled)
            NAME(block)(tile, in, out, tile->columns, left, right, state, place, ROWS, in_dtype, out_dtype);
        else /* most blocks, without a question for each row */
            NAME(block)(tile, in, out, tile->columns, left, right, state, (struct NAME(place)){row, column, 0}, ROWS,
                        in_dtype, out_dtype);
        row += rows;
    }
}

/* The sums of a row that others have merged: `before` and `now` are stored, `after` is what was rounded. */
FN void NAME(measure_row)(const struct tile *tile, const char *before, const REAL *after, const char *now,
                          double *row) {
    const size_t in_size = dtype_size(tile->in_dtype), out_size = dtype_size(tile->out_dtype);
    for (ptrdiff_t column = 0; column < tile->columns; column += BLOCK_COLUMNS) {
        const ptrdiff_t left = tile->columns - column, width = left < BLOCK_COLUMNS ? left : BLOCK_COLUMNS;
        char wide_before[4 * BLOCK_COLUMNS] = {0}, wide_now[4 * BLOCK_COLUMNS] = {0};
        REAL wide_after[BLOCK_COLUMNS] = {0};
        struct NAME(line) line;
        memcpy(wide_before, before + column * in_size, width * in_size);
        memcpy(wide_now, now + column * out_size, width * out_size);
        memcpy(wide_after, after + column, width * sizeof(REAL));
        for (int v = 0; v < VECS; v++) {
            const VEC base = NAME(load)(wide_before + v * LANES * in_size, tile->in_dtype);
            v_store(line.before + v * LANES, base);
            v_store(line.delta + v * LANES, v_sub(v_load(wide_after + v * LANES), base));
        }
        NAME(measure)(&line, wide_now, row, column == 0, tile->in_dtype, tile->out_dtype);
    }
}

OUTER void NAME(measure_rows)(const struct tile *tile, const void *after) {
    const size_t in_size = dtype_size(tile->in_dtype), out_size = dtype_size(tile->out_dtype);
    for (ptrdiff_t row = next_sampled(tile, 0); row < tile->rows; row += tile->stride) {
        const ptrdiff_t at = row * tile->columns;
        NAME(measure_row)(tile, (const char *)tile->in + at * in_size, (const REAL *)after + at,
                          (const char *)tile->out + at * out_size,
                          tile->sums + (tile->first + row) / tile->stride * SUMS);
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
#undef v_sub
#undef v_store
#undef SET

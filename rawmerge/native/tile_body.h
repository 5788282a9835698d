/* The tile's loops, included once per instruction set and precision, over the vectors that the including file defines:

   NAME(x)                   x with the set's suffix
   FN                        attributes of an inlined function
   REAL, VEC, LANES          element of the factors, vector of it, and how many it has
   ROWS, VECS                rows and vectors of one block held in registers
   v_zero v_set1 v_load v_store v_fma v_mul v_add v_sub
   NAME(load)(pointer, dtype)                  stored elements, widened exactly
   NAME(store)(pointer, vector, dtype, state)  rounded once and stored; the state remembers what may overflow
   NAME(rounded)(vector, dtype, state)         rounded once, and widened again; what overflows becomes infinite, which
                                               the sum that is stored then shows
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

/* One row of a block: the base's values, what the one rounding gets less them, and what it gives. */
struct NAME(line) {
    REAL before[BLOCK_COLUMNS], delta[BLOCK_COLUMNS], now[BLOCK_COLUMNS];
};

/* Add a sampled row's part in a block to its sums; they begin with the first column.
   Where a block is padded, 0 has become 0, and nothing is added. */
OUTER static __attribute__((noinline)) void NAME(measure)(const struct NAME(line) *line, double *row, int is_first,
                                                          int in_dtype, int out_dtype) {
    struct NAME(state) ignored = NAME(begin)(0);
    struct SET(sums) sums;
    memset(&sums, 0, sizeof sums);
    if (is_first) memset(row, 0, SUMS * sizeof *row);
    for (int v = 0; v < VECS; v++) {
        VEC old = v_load(line->before + v * LANES);
        if (in_dtype != out_dtype) old = NAME(rounded)(old, out_dtype, &ignored);
        NAME(add)(&sums, v_load(line->delta + v * LANES), old, v_load(line->now + v * LANES));
    }
    SET(end)(&sums, row);
}

/* Where a block lies: its first row and column in the tile, and the rows of it that are sampled, as bits. */
struct NAME(place) {
    ptrdiff_t row, column;
    unsigned sampled;
};

/* What a pair gives for a block, before it is scaled. */
FN void NAME(product)(const struct pair *pair, struct NAME(place) place, VEC (*sum)[VECS], const int rows) {
    const ptrdiff_t rank = pair->rank, first = pair->block < rank ? pair->block : rank;
    const REAL *left = (const REAL *)pair->left + place.row * rank;
    const REAL *right = (const REAL *)pair->right + place.column / PANEL * PANEL * rank + place.column % PANEL;
    NAME(chain)(sum, left, rank, right, 0, first, rows);
    for (ptrdiff_t from = first; from < rank; from += pair->block) {
        const ptrdiff_t to = from + pair->block < rank ? from + pair->block : rank;
        struct NAME(registers) total;
        memcpy(total.sum, sum, sizeof total.sum);
        NAME(chain)(sum, left, rank, right, from, to, rows);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECS; v++) sum[r][v] = v_add(total.sum[r][v], sum[r][v]);
    }
}

/* Where the sums of a sampled row are. */
FN double *NAME(sums_of)(const struct tile *tile, const struct pair *pair, ptrdiff_t row) {
    return pair->sums + (tile->first + row) / tile->stride * SUMS;
}

/* The base's block as it is stored, and how far its rows are apart, in elements. */
struct NAME(source) {
    const char *in;
    ptrdiff_t stride;
};

/* A pair that is not the last, for one block: `values` (rows, BLOCK_COLUMNS) holds what those before it gave. */
FN void NAME(between)(const struct tile *tile, const struct pair *pair, REAL (*values)[BLOCK_COLUMNS],
                      struct NAME(state) *state, struct NAME(place) place, const int rows, const int in_dtype,
                      const int out_dtype) {
    struct NAME(registers) now;
    const VEC scale = v_set1((REAL)pair->scale);
    NAME(product)(pair, place, now.sum, rows);
    for (int r = 0; r < rows; r++) {
        struct NAME(line) line;
        const int is_sampled = tile->rounds_between && pair->sums && (place.sampled >> r & 1);
        for (int v = 0; v < VECS; v++) {
            VEC before = v_load(values[r] + v * LANES);
            VEC delta = v_mul(now.sum[r][v], scale);
            if (pair->rounds_delta) delta = NAME(rounded)(delta, out_dtype, state);
            VEC after = v_add(before, delta);
            if (!tile->rounds_between) {
                v_store(values[r] + v * LANES, after);
                continue;
            }
            if (in_dtype != out_dtype) NAME(watch)(after, state);
            VEC kept = NAME(rounded)(after, out_dtype, state);
            v_store(values[r] + v * LANES, kept);
            if (is_sampled) {
                v_store(line.before + v * LANES, before);
                v_store(line.delta + v * LANES, v_sub(after, before));
                v_store(line.now + v * LANES, kept);
            }
            if (!state->changed) {
                if (in_dtype != out_dtype) before = NAME(rounded)(before, out_dtype, state);
                state->changed = NAME(unequal)(kept, before);
            }
        }
        if (is_sampled)
            NAME(measure)(&line, NAME(sums_of)(tile, pair, place.row + r), place.column == 0, in_dtype, out_dtype);
    }
}

/* The last pair for one block, which is then stored at `out`. */
FN void NAME(last)(const struct tile *tile, struct NAME(source) source, char *out, REAL (*values)[BLOCK_COLUMNS],
                   struct NAME(state) *state, struct NAME(place) place, const int rows, const int in_dtype,
                   const int out_dtype, const int is_only) {
    struct NAME(registers) now;
    const struct pair *pair = tile->pairs + tile->pair_count - 1;
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    const VEC scale = v_set1((REAL)pair->scale);
    const int is_whole = is_only || !tile->rounds_between; /* what is stored follows from the base alone */
    NAME(product)(pair, place, now.sum, rows);
    for (int r = 0; r < rows; r++) {
        struct NAME(line) line;
        const int is_sampled = pair->sums && (place.sampled >> r & 1);
        for (int v = 0; v < VECS; v++) {
            const ptrdiff_t at = r * source.stride + v * LANES;
            VEC before = is_whole ? NAME(load)(source.in + at * in_size, in_dtype) : v_load(values[r] + v * LANES);
            VEC delta = v_mul(now.sum[r][v], scale);
            if (pair->rounds_delta) delta = NAME(rounded)(delta, out_dtype, state);
            VEC after = v_add(is_only ? before : v_load(values[r] + v * LANES), delta);
            if (in_dtype != out_dtype) NAME(watch)(after, state);
            NAME(store)(out + at * out_size, after, out_dtype, state);
            if (is_sampled) {
                v_store(line.before + v * LANES, before);
                v_store(line.delta + v * LANES, v_sub(after, before));
                v_store(line.now + v * LANES, NAME(load)(out + at * out_size, out_dtype));
            }
            if (!state->changed) {
                if (in_dtype != out_dtype) before = NAME(rounded)(before, out_dtype, state);
                state->changed = NAME(unequal)(NAME(load)(out + at * out_size, out_dtype), before);
            }
        }
        if (is_sampled)
            NAME(measure)(&line, NAME(sums_of)(tile, pair, place.row + r), place.column == 0, in_dtype, out_dtype);
    }
}

/* One block of rows x BLOCK_COLUMNS. `stride` is the distance between rows of `in` and `out` in elements. */
FN void NAME(block)(const struct tile *tile, const char *in, char *out, ptrdiff_t stride, struct NAME(state) *state,
                    struct NAME(place) place, const int rows, const int in_dtype, const int out_dtype) {
    const struct NAME(source) source = {in, stride};
    if (tile->pair_count == 1) {
        NAME(last)(tile, source, out, NULL, state, place, rows, in_dtype, out_dtype, 1);
        return;
    }
    REAL values[ROWS][BLOCK_COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++)
            v_store(values[r] + v * LANES,
                    NAME(load)(in + (r * stride + v * LANES) * dtype_size(in_dtype), in_dtype));
    for (ptrdiff_t p = 0; p < tile->pair_count - 1; p++)
        NAME(between)(tile, tile->pairs + p, values, state, place, rows, in_dtype, out_dtype);
    NAME(last)(tile, source, out, values, state, place, rows, in_dtype, out_dtype, 0);
}

/* A block at the tile's right edge, by way of rows that are wide enough. */
FN void NAME(edge)(const struct tile *tile, const char *in, char *out, ptrdiff_t width, struct NAME(state) *state,
                   struct NAME(place) place, const int in_dtype, const int out_dtype) {
    char wide_in[4 * BLOCK_COLUMNS] = {0}, wide_out[4 * BLOCK_COLUMNS];
    memcpy(wide_in, in, width * dtype_size(in_dtype));
    NAME(block)(tile, wide_in, wide_out, BLOCK_COLUMNS, state, place, 1, in_dtype, out_dtype);
    memcpy(out, wide_out, width * dtype_size(out_dtype));
}

FN void NAME(column)(const struct tile *tile, ptrdiff_t column, ptrdiff_t first, ptrdiff_t last,
                     struct NAME(state) *state, const int in_dtype, const int out_dtype) {
    const size_t in_size = dtype_size(in_dtype), out_size = dtype_size(out_dtype);
    const ptrdiff_t width = tile->columns - column;
    ptrdiff_t row = first, next = next_sampled(tile, first);
    while (row < last) {
        const int rows = width >= BLOCK_COLUMNS && row + ROWS <= last ? ROWS : 1;
        struct NAME(place) place = {row, column, 0};
        const ptrdiff_t at = row * tile->columns + column;
        const char *in = (const char *)tile->in + at * in_size;
        char *out = (char *)tile->out + at * out_size;
        for (; next < row + rows; next += tile->stride) place.sampled |= 1u << (next - row);
        if (width < BLOCK_COLUMNS)
            NAME(edge)(tile, in, out, width, state, place, in_dtype, out_dtype);
        else if (rows == 1)
            NAME(block)(tile, in, out, tile->columns, state, place, 1, in_dtype, out_dtype);
        else if (place.sampled)
            NAME(block)(tile, in, out, tile->columns, state, place, ROWS, in_dtype, out_dtype);
        else /* most blocks, without a question for each row */
            NAME(block)(tile, in, out, tile->columns, state, (struct NAME(place)){row, column, 0}, ROWS, in_dtype,
                        out_dtype);
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
            v_store(line.now + v * LANES, NAME(load)(wide_now + v * LANES * out_size, tile->out_dtype));
        }
        NAME(measure)(&line, row, column == 0, tile->in_dtype, tile->out_dtype);
    }
}

OUTER void NAME(measure_rows)(const struct tile *tile, const void *after) {
    const size_t in_size = dtype_size(tile->in_dtype), out_size = dtype_size(tile->out_dtype);
    for (ptrdiff_t row = next_sampled(tile, 0); row < tile->rows; row += tile->stride) {
        const ptrdiff_t at = row * tile->columns;
        NAME(measure_row)(tile, (const char *)tile->in + at * in_size, (const REAL *)after + at,
                          (const char *)tile->out + at * out_size, NAME(sums_of)(tile, tile->pairs, row));
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

/* The Python module `rawmerge.native._kernel`: checks buffers and numbers, and lets the GIL go while it computes. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <limits.h>
#include <string.h>

#include "tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

/* 2: AVX-512, 1: AVX2 with FMA and F16C, 0: neither, and no tile can be merged here. */
static int instruction_level(void) {
#if HAS_TILES
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return 1;
#else
    return 0;
#endif
}

static merge_tile *tile_merger(int level, int is_double) {
#if HAS_TILES
    if (level == 2) return is_double ? merge_double_avx512 : merge_float_avx512;
    return is_double ? merge_double_avx2 : merge_float_avx2;
#else
    (void)level, (void)is_double;
    return NULL;
#endif
}

static measure_tile *tile_measurer(int level, int is_double) {
#if HAS_TILES
    if (level == 2) return is_double ? measure_rows_double_avx512 : measure_rows_float_avx512;
    return is_double ? measure_rows_double_avx2 : measure_rows_float_avx2;
#else
    (void)level, (void)is_double;
    return NULL;
#endif
}

/* a * b * c, or -1 where a factor is negative or the product has no room in a Py_ssize_t. */
static Py_ssize_t product(Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) {
    if (a < 0 || b < 0 || c < 0) return -1;
    if (a == 0 || b == 0 || c == 0) return 0;
    if (a > PY_SSIZE_T_MAX / b || a * b > PY_SSIZE_T_MAX / c) return -1;
    return a * b * c;
}

static int is_dtype(int code) { return code == BF16 || code == F16 || code == F32; }

static int has_bytes(const Py_buffer *buffer, Py_ssize_t a, Py_ssize_t b, Py_ssize_t c) {
    const Py_ssize_t needed = product(a, b, c);
    return needed >= 0 && buffer->len >= needed;
}

static Py_ssize_t panels(Py_ssize_t columns) { return columns / PANEL + (columns % PANEL != 0); }

static int is_sound(const struct tile *tile, const Py_buffer *in, const Py_buffer *out, int level) {
    if (!is_dtype(tile->in_dtype) || !is_dtype(tile->out_dtype) || tile->rows < 0 || tile->columns < 0) return 0;
    if (level < 1 || level > instruction_level()) return 0;
    if (in->buf == out->buf && dtype_size(tile->in_dtype) != dtype_size(tile->out_dtype)) return 0;
    return has_bytes(in, tile->rows, tile->columns, dtype_size(tile->in_dtype)) &&
           has_bytes(out, tile->rows, tile->columns, dtype_size(tile->out_dtype));
}

/* Whether the sums of all sampled rows have room, at an address that doubles may have. */
static int has_sums(const struct tile *tile, const Py_buffer *sums) {
    if (!tile->stride) return 0;
    if (tile->stride < 0 || tile->stride > PY_SSIZE_T_MAX / 4) return 0;
    if (tile->first < 0 || tile->rows > PY_SSIZE_T_MAX / 4 - tile->first) return 0;
    if (!sums->buf || (uintptr_t)sums->buf % sizeof(double)) return 0;
    const Py_ssize_t end = tile->first + tile->rows;
    return has_bytes(sums, end / tile->stride + (end % tile->stride != 0), SUMS, sizeof(double));
}

/* A pair with the buffers that it lies in. */
struct held {
    struct pair pair;
    Py_buffer left, right, sums;
};

static void let_go(struct held *held, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyBuffer_Release(&held[i].left);
        PyBuffer_Release(&held[i].right);
        PyBuffer_Release(&held[i].sums);
    }
}

static int is_sound_pair(const struct tile *tile, const struct held *held, int is_double) {
    const struct pair *pair = &held->pair;
    const Py_ssize_t real = is_double ? 8 : 4;
    const Py_ssize_t panel_bytes = product(pair->rank, PANEL, real), left_bytes = product(pair->rank, real, 1);
    if (pair->rank < 1 || pair->block < 1 || panel_bytes < 0 || left_bytes < 0) return 0;
    if (pair->rounds_delta && is_double) return 0;
    if (pair->sums && !has_sums(tile, &held->sums)) return 0;
    return has_bytes(&held->left, tile->rows, left_bytes, 1) &&
           has_bytes(&held->right, panels(tile->columns), panel_bytes, 1);
}

/* Take a pair from (left, right, rank, block, scale, rounds_delta, sums or None). */
static int take(PyObject *from, struct held *held) {
    PyObject *sums = NULL;
    if (!PyTuple_Check(from)) {
        PyErr_SetString(PyExc_TypeError, "a pair is a tuple");
        return 0;
    }
    if (!PyArg_ParseTuple(from, "y*y*nndpO", &held->left, &held->right, &held->pair.rank, &held->pair.block,
                          &held->pair.scale, &held->pair.rounds_delta, &sums))
        return 0;
    if (sums != Py_None && PyObject_GetBuffer(sums, &held->sums, PyBUF_WRITABLE) < 0) return 0;
    held->pair.left = held->left.buf, held->pair.right = held->right.buf, held->pair.sums = held->sums.buf;
    return 1;
}

/* Merge with the pairs of a tuple; the flags, or -1 with an error set. */
static int merge_pairs(struct tile *tile, PyObject *from, int is_double, int level, struct held *held) {
    const Py_ssize_t count = tile->pair_count;
    struct pair *pairs = PyMem_Calloc(count, sizeof *pairs);
    int found = -1, is_whole = pairs != NULL;
    if (!pairs) PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count && is_whole; i++) {
        PyObject *item = PyTuple_GetItem(from, i);
        is_whole = item && take(item, &held[i]);
        if (is_whole && !is_sound_pair(tile, &held[i], is_double)) {
            PyErr_SetString(PyExc_ValueError, "a buffer is too small for a pair, or a number is out of its range");
            is_whole = 0;
        }
        pairs[i] = held[i].pair;
    }
    if (is_whole) {
        tile->pairs = pairs;
        Py_BEGIN_ALLOW_THREADS;
        found = tile_merger(level, is_double)(tile);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(pairs);
    return found;
}

static PyObject *merge(PyObject *self, PyObject *args) {
    Py_buffer in = {0}, out = {0};
    struct tile tile = {0};
    PyObject *pairs;
    int is_double, level, found = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*O!(nn)(ii)pppi(nn)", &in, &out, &PyTuple_Type, &pairs, &tile.rows, &tile.columns,
                          &tile.in_dtype, &tile.out_dtype, &is_double, &tile.rounds_between, &tile.finds_changes,
                          &level, &tile.first, &tile.stride))
        return NULL;
    tile.in = in.buf, tile.out = out.buf, tile.pair_count = PyTuple_Size(pairs);
    struct held *held = PyMem_Calloc(tile.pair_count, sizeof *held);
    if (!held || !tile.pair_count || !is_sound(&tile, &in, &out, level))
        PyErr_SetString(PyExc_ValueError, "a buffer is too small for the tile, or a number is out of its range");
    else
        found = merge_pairs(&tile, pairs, is_double, level, held);
    if (held) let_go(held, tile.pair_count);
    PyMem_Free(held);
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    return found < 0 ? NULL : PyLong_FromLong(found);
}

static int is_measurable(const struct tile *tile, const Py_buffer *buffers, int is_double, int level) {
    if (!is_dtype(tile->in_dtype) || !is_dtype(tile->out_dtype) || tile->rows < 0 || tile->columns < 0) return 0;
    if (level < 1 || level > instruction_level() || tile->stride < 1) return 0;
    return has_bytes(&buffers[0], tile->rows, tile->columns, dtype_size(tile->in_dtype)) &&
           has_bytes(&buffers[1], tile->rows, tile->columns, is_double ? 8 : 4) &&
           has_bytes(&buffers[2], tile->rows, tile->columns, dtype_size(tile->out_dtype)) &&
           has_sums(tile, &buffers[3]);
}

static PyObject *measure(PyObject *self, PyObject *args) {
    Py_buffer buffers[4];
    struct tile tile = {0};
    int is_double, level;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*w*(nn)nniipi", &buffers[0], &buffers[1], &buffers[2], &buffers[3], &tile.rows,
                          &tile.columns, &tile.first, &tile.stride, &tile.in_dtype, &tile.out_dtype, &is_double,
                          &level))
        return NULL;
    struct pair pair = {.sums = buffers[3].buf};
    tile.in = buffers[0].buf, tile.out = buffers[2].buf, tile.pairs = &pair;
    const int is_sound_call = is_measurable(&tile, buffers, is_double, level);
    if (is_sound_call) {
        Py_BEGIN_ALLOW_THREADS;
        tile_measurer(level, is_double)(&tile, buffers[1].buf);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "a buffer is too small for the rows, or a number is out of its range");
    }
    for (int i = 0; i < 4; i++) PyBuffer_Release(&buffers[i]);
    if (!is_sound_call) return NULL;
    Py_RETURN_NONE;
}

/* A NaN's payload must not carry into the exponent where it is rounded to a bfloat. */
static float plain(float value) { return value == value ? value : __builtin_copysignf(__builtin_nanf(""), value); }

/* Exactly; where half is subnormal the float is not. */
static float widen_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, 4);
    return value;
}

static float widen(const char *stored, Py_ssize_t at, int dtype) {
    float value;
    uint16_t half;
    if (dtype == F32) {
        memcpy(&value, stored + 4 * at, 4);
        return value;
    }
    memcpy(&half, stored + 2 * at, 2);
    if (dtype == F16) return widen_half(half);
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static void put(void *packed, Py_ssize_t at, float value, int is_double) {
    if (is_double)
        ((double *)packed)[at] = plain(value);
    else
        ((float *)packed)[at] = plain(value);
}

/* `count` elements at `at`, `step` apart. Those side by side are what most of the time goes to. */
static void widen_row(const char *stored, Py_ssize_t at, Py_ssize_t step, Py_ssize_t count, int dtype, void *packed,
                      Py_ssize_t to, int is_double) {
    if (step == 1 && dtype == F32 && !is_double) {
        memcpy((float *)packed + to, stored + 4 * at, 4 * count);
        for (Py_ssize_t i = to; i < to + count; i++) ((float *)packed)[i] = plain(((float *)packed)[i]);
        return;
    }
    for (Py_ssize_t i = 0; i < count; i++) put(packed, to + i, widen(stored, at + i * step, dtype), is_double);
}

/* A left factor: (outer, inner), row by row. */
static void pack_left(const char *stored, void *packed, int dtype, Py_ssize_t outer, Py_ssize_t inner,
                      Py_ssize_t outer_step, Py_ssize_t inner_step, int is_double) {
    for (Py_ssize_t row = 0; row < outer; row++)
        widen_row(stored, row * outer_step, inner_step, inner, dtype, packed, row * inner, is_double);
}

/* A right factor: panels of PANEL rows, in each of which the rows lie side by side; the last is padded with zeros. */
static void pack_right(const char *stored, void *packed, int dtype, Py_ssize_t outer, Py_ssize_t inner,
                       Py_ssize_t outer_step, Py_ssize_t inner_step, int is_double) {
    for (Py_ssize_t first = 0; first < outer; first += PANEL) {
        const Py_ssize_t count = outer - first < PANEL ? outer - first : PANEL;
        for (Py_ssize_t k = 0; k < inner; k++) {
            const Py_ssize_t to = first * inner + k * PANEL;
            widen_row(stored, first * outer_step + k * inner_step, outer_step, count, dtype, packed, to, is_double);
            for (Py_ssize_t i = count; i < PANEL; i++) put(packed, to + i, 0.0f, is_double);
        }
    }
}

static PyObject *pack(PyObject *self, PyObject *args) {
    Py_buffer stored, packed;
    Py_ssize_t outer, inner, outer_step, inner_step;
    int dtype, is_right, is_double;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*i(nnnn)pp", &stored, &packed, &dtype, &outer, &inner, &outer_step, &inner_step,
                          &is_right, &is_double))
        return NULL;
    const Py_ssize_t padded = is_right ? product(panels(outer), PANEL, 1) : outer;
    const int steps_fit = (outer_step == 1 && inner_step == outer) || (inner_step == 1 && outer_step == inner);
    const int fits = is_dtype(dtype) && steps_fit && padded >= 0 &&
                     has_bytes(&stored, outer, inner, dtype_size(dtype)) &&
                     has_bytes(&packed, padded, inner, is_double ? 8 : 4);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        (is_right ? pack_right : pack_left)(stored.buf, packed.buf, dtype, outer, inner, outer_step, inner_step,
                                            is_double);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "a buffer is too small for the factor, or a number is out of its range");
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&packed);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"merge", merge, METH_VARARGS, "merge(in, out, ((left, right, rank, block, scale, rounds_delta, sums), ...), "
                                   "(rows, columns), (in_dtype, out_dtype), is_double, rounds_between, finds_changes, "
                                   "level, (first_row, stride)) -> flags"},
    {"measure", measure, METH_VARARGS, "measure(before, after, now, sums, (rows, columns), first_row, stride, in_dtype, "
                                       "out_dtype, is_double, level)"},
    {"pack", pack, METH_VARARGS, "pack(stored, packed, dtype, (outer, inner, outer_step, inner_step), is_right, "
                                 "is_double)"},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) {
    if (PyModule_AddIntConstant(module, "LEVEL", instruction_level()) < 0) return -1;
    if (PyModule_AddIntConstant(module, "PANEL", PANEL) < 0) return -1;
    if (PyModule_AddIntConstant(module, "CHANGED", CHANGED) < 0) return -1;
    return PyModule_AddIntConstant(module, "CARE", CARE);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", "Merges tiles of plain LoRA in one pass.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }

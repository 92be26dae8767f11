/* Multi-scale deformable sampling on the CPU, forward and backward. ops/cpu.py compiles it, ops/__init__.py checks the
 * shapes. Locations may have any value.
 *
 * Contiguous layouts: value (B, S, M, D), loc (B, Q, M, L, P, 2), attn (B, Q, M, L, P), out (B, Q, M, D). Needs the
 * vector extensions of GCC and clang, which split vectors for CPUs with narrower ones.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define QUERY_BLOCK 16 /* queries of a task */
#define TILE 8         /* points of a tile */

/* `_Problem` in ops/cpu.py. */
typedef struct {
    int64_t batch, tokens, heads, width, levels, queries, points, threads;
    const int64_t *shapes; /* (levels, 2): height, width */
} problem;

/* Arrays over the points of a head (levels x points): sides of the point's level in pixels, and its first token. */
typedef struct {
    double *width, *height, *start;
} level_of_point;

static int spread_levels(const problem *p, level_of_point *spread) {
    const int64_t count = p->levels * p->points;
    double *memory = malloc(3 * (size_t)count * sizeof *memory);
    if (!memory) return 1;
    spread->width = memory, spread->height = memory + count, spread->start = memory + 2 * count;
    int64_t start = 0;
    for (int64_t l = 0; l < p->levels; l++) {
        for (int64_t i = l * p->points; i < (l + 1) * p->points; i++) {
            spread->height[i] = (double)p->shapes[2 * l];
            spread->width[i] = (double)p->shapes[2 * l + 1];
            spread->start[i] = (double)start;
        }
        start += p->shapes[2 * l] * p->shapes[2 * l + 1];
    }
    return 0;
}

static int64_t level_start(const problem *p, int64_t level) {
    int64_t start = 0;
    for (int64_t l = 0; l < level; l++) start += p->shapes[2 * l] * p->shapes[2 * l + 1];
    return start;
}

/* Blocks of queries from one flush of a level to the next. The rounding error of a float sum of n terms grows with n,
 * that of a sum over blocks of k terms with k and n / k: k = max(64, sqrt(n)), n = mean number of terms of a token. */
static int64_t blocks_per_flush(const problem *p, int64_t level) {
    const double per_query = 4.0 * (double)p->points / (double)(p->shapes[2 * level] * p->shapes[2 * level + 1]);
    const double terms = __builtin_sqrt(per_query * (double)p->queries);
    return (int64_t)((terms > 64.0 ? terms : 64.0) / (per_query * QUERY_BLOCK)) + 1;
}

typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(32)));
typedef float loose_floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double loose_doubles __attribute__((vector_size(32), aligned(8), may_alias));

/* dot[c] += sum of the lanes of v[c], for four vectors at once. */
static ALWAYS_INLINE void add_lane_sums_f32(float *dot, const floats *v) {
#if defined(__clang__) || __GNUC__ >= 12
    typedef float quad __attribute__((vector_size(16)));
    const floats ab = __builtin_shufflevector(v[0], v[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                      __builtin_shufflevector(v[0], v[1], 1, 9, 3, 11, 5, 13, 7, 15);
    const floats cd = __builtin_shufflevector(v[2], v[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                      __builtin_shufflevector(v[2], v[3], 1, 9, 3, 11, 5, 13, 7, 15);
    const floats abcd = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                        __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    const quad sums = __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
    for (int c = 0; c < 4; c++) dot[c] += sums[c];
#else
    for (int c = 0; c < 4; c++)
        dot[c] += ((v[c][0] + v[c][1]) + (v[c][2] + v[c][3])) + ((v[c][4] + v[c][5]) + (v[c][6] + v[c][7]));
#endif
}

static ALWAYS_INLINE void add_lane_sums_f64(double *dot, const doubles *v) {
    for (int c = 0; c < 4; c++) dot[c] += (v[c][0] + v[c][1]) + (v[c][2] + v[c][3]);
}

#define BACKWARD

#define NAME(x) x##_f32
#define REAL float
#define VALUE float
#define LANES 8
#define VEC floats
#define LOAD_VEC(p) ((floats) * (const loose_floats *)(p))
#define STORE_VEC(p, x) (*(loose_floats *)(p) = (x))
#define ADD_LANE_SUMS add_lane_sums_f32
#include "deformable_template.h"

#define NAME(x) x##_f64
#define REAL double
#define VALUE double
#define LANES 4
#define VEC doubles
#define LOAD_VEC(p) ((doubles) * (const loose_doubles *)(p))
#define STORE_VEC(p, x) (*(loose_doubles *)(p) = (x))
#define ADD_LANE_SUMS add_lane_sums_f64
#include "deformable_template.h"
#undef BACKWARD

/* bfloat16: value and out are the upper halves of floats; locations, weights and sums are float. */
typedef uint16_t halves __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(32)));

static ALWAYS_INLINE float load_bf16(const uint16_t *p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static ALWAYS_INLINE void store_bf16(uint16_t *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    /* Round to nearest even. Rounding could turn a NaN into another number. */
    *p = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static ALWAYS_INLINE floats load_bf16_vector(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
}

static ALWAYS_INLINE void store_bf16_vector(uint16_t *p, floats x) {
    for (int k = 0; k < 8; k++) store_bf16(p + k, x[k]);
}

#define NAME(x) x##_bf16
#define REAL float
#define VALUE uint16_t
#define LANES 8
#define VEC floats
#define LOAD load_bf16
#define STORE store_bf16
#define LOAD_VEC load_bf16_vector
#define STORE_VEC store_bf16_vector
#include "deformable_template.h"

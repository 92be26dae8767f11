/* One instantiation of deformable sampling; included by deformable_cpu.c once per dtype, with these macros set:
 *   REAL    arithmetic type            VALUE   storage type of value and out
 *   LANES   REALs in one vector        VEC     vector of LANES REALs (need not be aligned)
 *   LOAD_VEC / STORE_VEC / LOAD / STORE   conversions between VALUE and VEC / REAL
 *   NAME(x) x with the dtype's suffix  BACKWARD  defined when the backward pass is wanted (VALUE is then REAL)
 *
 * The head width is walked in chunks of 4, 2 and 1 vectors and then single elements, so each chunk accumulates in
 * registers whatever D is: D = 32 floats is one chunk of four, D = 16 one of two.
 */

/* Where the points of one query and head fall: arrays over the points, so that they are filled by vector code. A corner
 * outside its map has weight 0 and stands on its neighbour inside, a token the point reads anyway: no branch in the
 * inner loops, and no foreign NaN can leak in. A point wholly outside has inside = 0 and is not read at all. */
typedef struct {
    int32_t *inside, *token, *right, *below; /* token of the top left corner; steps to the right column, lower row */
    REAL *corner[4];                         /* top left, top right, bottom left, bottom right: bilinear x attention */
#ifdef BACKWARD
    REAL *x0, *x1, *y0, *y1;                 /* bilinear weight of the left, right column, top, bottom row; 0 outside */
    REAL *in_x0, *in_x1, *in_y0, *in_y1;     /* 1 inside the map, 0 outside */
    REAL *dot;                               /* (points, 4): <grad_out, corner's row> */
#endif
} NAME(points);

#ifdef BACKWARD
#define REAL_ARRAYS 16
#else
#define REAL_ARRAYS 4
#endif

static size_t NAME(scratch_size)(int64_t count) { return (size_t)count * (REAL_ARRAYS * sizeof(REAL) + 4 * 4); }

static NAME(points) NAME(scratch)(char *memory, int64_t count) {
    REAL *reals = (REAL *)memory;
    int32_t *ints = (int32_t *)(reals + REAL_ARRAYS * count);
    NAME(points) s = {.inside = ints, .token = ints + count, .right = ints + 2 * count, .below = ints + 3 * count};
    for (int c = 0; c < 4; c++) s.corner[c] = reals + c * count;
#ifdef BACKWARD
    s.x0 = reals + 4 * count, s.x1 = reals + 5 * count, s.y0 = reals + 6 * count, s.y1 = reals + 7 * count;
    s.in_x0 = reals + 8 * count, s.in_x1 = reals + 9 * count, s.in_y0 = reals + 10 * count;
    s.in_y1 = reals + 11 * count, s.dot = reals + 12 * count;
#endif
    return s;
}

/* Fill s for points begin..end-1. The position is computed in double: for float32 locations that is exact, so floor()
 * is never off by one, and the bilinear weights keep all their bits on wide maps (in float32, loc * 200 would already
 * have lost eight of them). */
static inline void NAME(locate)(const level_of_point *levels, int64_t begin, int64_t end, const REAL *restrict loc,
                                const REAL *restrict attn, NAME(points) s) {
    const double *restrict widths = levels->width, *restrict heights = levels->height, *restrict starts = levels->start;
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        const double w = widths[i], h = heights[i];
        double x = (double)loc[2 * i] * w - 0.5, y = (double)loc[2 * i + 1] * h - 0.5;
        const int inside = (x >= -1.0) & (x < w) & (y >= -1.0) & (y < h); /* false for NaN */
        x = inside ? x : 0.0, y = inside ? y : 0.0;
        const double left = __builtin_floor(x), top = __builtin_floor(y), fx = x - left, fy = y - top;
        const double in_x0 = left >= 0.0 ? 1.0 : 0.0, in_x1 = left + 1.0 < w ? 1.0 : 0.0;
        const double in_y0 = top >= 0.0 ? 1.0 : 0.0, in_y1 = top + 1.0 < h ? 1.0 : 0.0;
        const REAL x0 = (REAL)((1.0 - fx) * in_x0), x1 = (REAL)(fx * in_x1);
        const REAL y0 = (REAL)((1.0 - fy) * in_y0), y1 = (REAL)(fy * in_y1);
        const REAL a = attn[i];
        s.inside[i] = inside;
        s.token[i] = (int32_t)(starts[i] + top * in_y0 * w + left * in_x0);
        s.right[i] = (int32_t)(in_x0 * in_x1);
        s.below[i] = (int32_t)(in_y0 * in_y1 * w);
        s.corner[0][i] = a * (y0 * x0), s.corner[1][i] = a * (y0 * x1);
        s.corner[2][i] = a * (y1 * x0), s.corner[3][i] = a * (y1 * x1);
#ifdef BACKWARD
        s.x0[i] = x0, s.x1[i] = x1, s.y0[i] = y0, s.y1[i] = y1;
        s.in_x0[i] = (REAL)in_x0, s.in_x1[i] = (REAL)in_x1, s.in_y0[i] = (REAL)in_y0, s.in_y1[i] = (REAL)in_y1;
#endif
    }
}

/* The offsets of point i's four rows, in elements. */
#define ROWS(s, i, stride)                                                                                             \
    {(s).token[i] * (stride), ((s).token[i] + (s).right[i]) * (stride), ((s).token[i] + (s).below[i]) * (stride),      \
     ((s).token[i] + (s).right[i] + (s).below[i]) * (stride)}

/* out[0 .. vectors * LANES) of one query and head; `vectors` is a constant where this is inlined. */
static ALWAYS_INLINE void NAME(forward_chunk)(NAME(points) s, int64_t count, const VALUE *value, int64_t stride,
                                              VALUE *out, int vectors) {
    VEC sum[4] = {{0}};
    for (int64_t i = 0; i < count; i++) {
        if (!s.inside[i]) continue;
        const int64_t rows[4] = ROWS(s, i, stride);
        for (int c = 0; c < 4; c++) {
            const VALUE *row = value + rows[c];
            const REAL weight = s.corner[c][i];
            for (int k = 0; k < vectors; k++) sum[k] += weight * LOAD_VEC(row + k * LANES);
        }
    }
    for (int k = 0; k < vectors; k++) STORE_VEC(out + k * LANES, sum[k]);
}

static inline void NAME(forward_row)(NAME(points) s, int64_t count, const VALUE *value, int64_t stride, VALUE *out,
                                     int64_t width) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) NAME(forward_chunk)(s, count, value + d, stride, out + d, 4);
    for (; d + 2 * LANES <= width; d += 2 * LANES) NAME(forward_chunk)(s, count, value + d, stride, out + d, 2);
    for (; d + LANES <= width; d += LANES) NAME(forward_chunk)(s, count, value + d, stride, out + d, 1);
    for (; d < width; d++) {
        REAL sum = 0;
        for (int64_t i = 0; i < count; i++) {
            if (!s.inside[i]) continue;
            const int64_t rows[4] = ROWS(s, i, stride);
            for (int c = 0; c < 4; c++) sum += s.corner[c][i] * LOAD(value + rows[c] + d);
        }
        STORE(out + d, sum);
    }
}

/* Tasks are blocks of queries of one picture; within a block, head by head, so that neighbouring queries meet the rows
 * of their head still in cache. Returns 0, or 1 when memory is short. */
int NAME(hpetr_forward)(const problem *p, const VALUE *value, const REAL *loc, const REAL *attn, VALUE *out) {
    const int64_t count = p->levels * p->points, blocks = (p->queries + QUERY_BLOCK - 1) / QUERY_BLOCK;
    const int64_t stride = p->heads * p->width;
    level_of_point levels;
    char *memory = malloc(p->threads * NAME(scratch_size)(count));
    if (!memory || spread_levels(p, &levels)) return free(memory), 1;
#pragma omp parallel num_threads(p->threads)
    {
        const NAME(points) s = NAME(scratch)(memory + thread_number() * NAME(scratch_size)(count), count);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p->batch * blocks; task++) {
            const int64_t b = task / blocks, begin = (task % blocks) * QUERY_BLOCK;
            const int64_t end = begin + QUERY_BLOCK < p->queries ? begin + QUERY_BLOCK : p->queries;
            for (int64_t m = 0; m < p->heads; m++) {
                const VALUE *head = value + b * p->tokens * stride + m * p->width;
                for (int64_t q = begin; q < end; q++) {
                    const int64_t row = (b * p->queries + q) * p->heads + m;
                    NAME(locate)(&levels, 0, count, loc + 2 * row * count, attn + row * count, s);
                    NAME(forward_row)(s, count, head, stride, out + row * p->width, p->width);
                }
            }
        }
    }
    free(memory);
    free(levels.width);
    return 0;
}

#ifdef BACKWARD
/* The rows of one point may coincide (see `points`), so grad_value is deliberately not restrict: each corner's
 * read-modify-write must be complete before the next one's. */
static ALWAYS_INLINE void NAME(backward_chunk)(NAME(points) s, int64_t begin, int64_t end, const REAL *value,
                                               int64_t stride, const REAL *grad_out, REAL *grad_value, int vectors) {
    VEC grad[4];
    for (int k = 0; k < vectors; k++) grad[k] = LOAD_VEC(grad_out + k * LANES);
    for (int64_t i = begin; i < end; i++) {
        if (!s.inside[i]) continue;
        const int64_t rows[4] = ROWS(s, i, stride);
        VEC dot[4];
        for (int c = 0; c < 4; c++) {
            const REAL *row = value + rows[c];
            REAL *grad_row = grad_value + rows[c];
            const REAL weight = s.corner[c][i];
            dot[c] = grad[0] * LOAD_VEC(row);
            for (int k = 1; k < vectors; k++) dot[c] += grad[k] * LOAD_VEC(row + k * LANES);
            for (int k = 0; k < vectors; k++)
                STORE_VEC(grad_row + k * LANES, LOAD_VEC(grad_row + k * LANES) + weight * grad[k]);
        }
        ADD_LANE_SUMS(s.dot + 4 * i, dot);
    }
}

static inline void NAME(backward_row)(NAME(points) s, int64_t begin, int64_t end, const REAL *value, int64_t stride,
                                      const REAL *grad_out, REAL *grad_value, int64_t width) {
    int64_t d = 0;
    memset(s.dot + 4 * begin, 0, (size_t)(end - begin) * 4 * sizeof(REAL));
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        NAME(backward_chunk)(s, begin, end, value + d, stride, grad_out + d, grad_value + d, 4);
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        NAME(backward_chunk)(s, begin, end, value + d, stride, grad_out + d, grad_value + d, 2);
    for (; d + LANES <= width; d += LANES)
        NAME(backward_chunk)(s, begin, end, value + d, stride, grad_out + d, grad_value + d, 1);
    for (; d < width; d++)
        for (int64_t i = begin; i < end; i++) {
            if (!s.inside[i]) continue;
            const int64_t rows[4] = ROWS(s, i, stride);
            for (int c = 0; c < 4; c++) {
                s.dot[4 * i + c] += grad_out[d] * value[rows[c] + d];
                grad_value[rows[c] + d] += s.corner[c][i] * grad_out[d];
            }
        }
}

static inline void NAME(point_gradients)(const level_of_point *levels, int64_t begin, int64_t end,
                                         const REAL *restrict attn, NAME(points) s, REAL *restrict grad_loc,
                                         REAL *restrict grad_attn) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        const REAL *d = s.dot + 4 * i;
        const REAL top_left = d[0], top_right = d[1], low_left = d[2], low_right = d[3];
        const REAL gx = s.y0[i] * (s.in_x1[i] * top_right - s.in_x0[i] * top_left) +
                        s.y1[i] * (s.in_x1[i] * low_right - s.in_x0[i] * low_left);
        const REAL gy = s.x0[i] * (s.in_y1[i] * low_left - s.in_y0[i] * top_left) +
                        s.x1[i] * (s.in_y1[i] * low_right - s.in_y0[i] * top_right);
        grad_attn[i] = s.y0[i] * (s.x0[i] * top_left + s.x1[i] * top_right) +
                       s.y1[i] * (s.x0[i] * low_left + s.x1[i] * low_right);
        grad_loc[2 * i] = attn[i] * (REAL)levels->width[i] * gx;
        grad_loc[2 * i + 1] = attn[i] * (REAL)levels->height[i] * gy;
    }
}

/* grad_value must be zero on entry. A task is one head of one picture (and one level of it when that shares the work
 * better), whose slice of grad_value no other task touches: no race, and the same bits for any number of threads. */
int NAME(hpetr_backward)(const problem *p, const REAL *grad_out, const REAL *value, const REAL *loc, const REAL *attn,
                         REAL *grad_value, REAL *grad_loc, REAL *grad_attn) {
    const int64_t count = p->levels * p->points, slices = p->batch * p->heads, stride = p->heads * p->width;
    const int64_t groups = slices % p->threads ? p->levels : 1;
    level_of_point levels;
    char *memory = malloc(p->threads * NAME(scratch_size)(count));
    if (!memory || spread_levels(p, &levels)) return free(memory), 1;
#pragma omp parallel num_threads(p->threads)
    {
        const NAME(points) s = NAME(scratch)(memory + thread_number() * NAME(scratch_size)(count), count);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < slices * groups; task++) {
            const int64_t b = task % slices / p->heads, m = task % slices % p->heads;
            const int64_t begin = task / slices * (count / groups), end = begin + count / groups;
            const int64_t head = b * p->tokens * stride + m * p->width;
            for (int64_t q = 0; q < p->queries; q++) {
                const int64_t row = (b * p->queries + q) * p->heads + m;
                NAME(locate)(&levels, begin, end, loc + 2 * row * count, attn + row * count, s);
                NAME(backward_row)(s, begin, end, value + head, stride, grad_out + row * p->width, grad_value + head,
                                   p->width);
                NAME(point_gradients)(&levels, begin, end, attn + row * count, s, grad_loc + 2 * row * count,
                                      grad_attn + row * count);
            }
        }
    }
    free(memory);
    free(levels.width);
    return 0;
}
#endif
#undef ROWS
#undef REAL_ARRAYS

/* Deformable sampling for one dtype. deformable_cpu.c includes it once a dtype, with macros that it undefines:
 *   REAL    arithmetic type            VALUE   storage type of value and out
 *   LANES   REALs in one vector        VEC     vector of LANES REALs, of any alignment
 *   LOAD_VEC / STORE_VEC / LOAD / STORE   conversions between VALUE and VEC / REAL; the last two default to copies
 *   NAME(x) x with the dtype's suffix  BACKWARD   defined for a backward pass, VALUE is then REAL
 *
 * The head width is processed in chunks of 4, 2 and 1 vectors and then single elements, so that each chunk is summed in
 * registers: D = 32 floats is one chunk of four, D = 16 one of two.
 */
#ifndef LOAD
#define LOAD(p) (*(p))
#define STORE(p, x) (*(p) = (x))
#endif

/* The places of TILE points of one query and head, so that vector code fills it. A corner outside the map has weight 0
 * and the token of its neighbor inside, which the point reads anyway: the inner loops need no branch, and no other
 * token's NaN leaks in. A point that is wholly outside has inside = 0 and is not read. */
typedef struct {
    int32_t inside[TILE], token[TILE], right[TILE], below[TILE]; /* top left token; steps to right column, lower row */
    REAL corner[4][TILE];               /* top left, top right, bottom left, bottom right: bilinear x attention */
#ifdef BACKWARD
    REAL x0[TILE], x1[TILE], y0[TILE], y1[TILE]; /* weight of left, right column, top, bottom row; 0 outside */
    REAL in_x0[TILE], in_x1[TILE], in_y0[TILE], in_y1[TILE]; /* 1 inside the map, 0 outside */
    REAL dot[TILE][4];                  /* <grad_out, corner's row> */
#endif
} __attribute__((aligned(64))) NAME(tile);

/* Fill one tile for points i..i+n-1. Positions are double, exact for float32 locations: floor() is never off by one, and
 * bilinear weights keep all bits on wide maps, where a float32 loc * 200 loses eight of them. */
static ALWAYS_INLINE void NAME(locate_tile)(const level_of_point *levels, int64_t i, int n, const REAL *restrict loc,
                                            const REAL *restrict attn, NAME(tile) *restrict s, int backward) {
    const double *restrict widths = levels->width + i, *restrict heights = levels->height + i;
    const double *restrict starts = levels->start + i;
    loc += 2 * i, attn += i;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const double w = widths[j], h = heights[j];
        double x = (double)loc[2 * j] * w - 0.5, y = (double)loc[2 * j + 1] * h - 0.5;
        const int inside = (x >= -1.0) & (x < w) & (y >= -1.0) & (y < h); /* false for NaN */
        x = inside ? x : 0.0, y = inside ? y : 0.0;
        const double left = __builtin_floor(x), top = __builtin_floor(y), fx = x - left, fy = y - top;
        const double in_x0 = left >= 0.0 ? 1.0 : 0.0, in_x1 = left + 1.0 < w ? 1.0 : 0.0;
        const double in_y0 = top >= 0.0 ? 1.0 : 0.0, in_y1 = top + 1.0 < h ? 1.0 : 0.0;
        const REAL x0 = (REAL)((1.0 - fx) * in_x0), x1 = (REAL)(fx * in_x1);
        const REAL y0 = (REAL)((1.0 - fy) * in_y0), y1 = (REAL)(fy * in_y1);
        const REAL a = attn[j];
        s->inside[j] = inside;
        s->token[j] = (int32_t)(starts[j] + top * in_y0 * w + left * in_x0);
        s->right[j] = (int32_t)(in_x0 * in_x1);
        s->below[j] = (int32_t)(in_y0 * in_y1 * w);
        s->corner[0][j] = a * (y0 * x0), s->corner[1][j] = a * (y0 * x1);
        s->corner[2][j] = a * (y1 * x0), s->corner[3][j] = a * (y1 * x1);
#ifdef BACKWARD
        if (backward) {
            s->x0[j] = x0, s->x1[j] = x1, s->y0[j] = y0, s->y1[j] = y1;
            s->in_x0[j] = (REAL)in_x0, s->in_x1[j] = (REAL)in_x1;
            s->in_y0[j] = (REAL)in_y0, s->in_y1[j] = (REAL)in_y1;
        }
#endif
    }
    (void)backward;
}

static ALWAYS_INLINE void NAME(locate)(const level_of_point *levels, int64_t begin, int64_t end, const REAL *loc,
                                       const REAL *attn, NAME(tile) *tiles, int backward) {
    int64_t i = begin;
    for (; i + TILE <= end; i += TILE) NAME(locate_tile)(levels, i, TILE, loc, attn, tiles++, backward);
    if (i < end) {
        memset(tiles->inside, 0, sizeof tiles->inside);
        NAME(locate_tile)(levels, i, (int)(end - i), loc, attn, tiles, backward);
    }
}

/* rows: the offsets of the four rows of point j, in elements. */
#define ROWS(s, j, stride)                                                                                             \
    const int64_t rows0 = (s)->token[j] * (stride), step = (s)->right[j] * (stride), down = (s)->below[j] * (stride);  \
    const int64_t rows[4] = {rows0, rows0 + step, rows0 + down, rows0 + down + step}

/* out[0 .. vectors * LANES) of one query and head; `vectors` is a constant after inlining. */
static ALWAYS_INLINE void NAME(forward_chunk)(const NAME(tile) *tiles, const NAME(tile) *last, const VALUE *value,
                                              int64_t stride, VALUE *out, int vectors) {
    /* At least 8 independent sums: each multiply-add of a single one would wait for the one before. */
    const int sets = vectors == 4 ? 2 : 4;
    VEC sum[4][4] = {{{0}}};
    for (const NAME(tile) *s = tiles; s < last; s++)
        for (int j = 0; j < TILE; j++) {
            if (!s->inside[j]) continue;
            ROWS(s, j, stride);
            for (int c = 0; c < 4; c++)
                for (int k = 0; k < vectors; k++)
                    sum[c % sets][k] += s->corner[c][j] * LOAD_VEC(value + rows[c] + k * LANES);
        }
    for (int k = 0; k < vectors; k++) STORE_VEC(out + k * LANES, (sum[0][k] + sum[1][k]) + (sum[2][k] + sum[3][k]));
}

static ALWAYS_INLINE void NAME(forward_row)(const NAME(tile) *tiles, const NAME(tile) *last, const VALUE *value,
                                            int64_t stride, VALUE *out, int64_t width) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) NAME(forward_chunk)(tiles, last, value + d, stride, out + d, 4);
    for (; d + 2 * LANES <= width; d += 2 * LANES) NAME(forward_chunk)(tiles, last, value + d, stride, out + d, 2);
    for (; d + LANES <= width; d += LANES) NAME(forward_chunk)(tiles, last, value + d, stride, out + d, 1);
    for (; d < width; d++) {
        REAL sum = 0;
        for (const NAME(tile) *s = tiles; s < last; s++)
            for (int j = 0; j < TILE; j++) {
                if (!s->inside[j]) continue;
                ROWS(s, j, stride);
                for (int c = 0; c < 4; c++) sum += s->corner[c][j] * LOAD(value + rows[c] + d);
            }
        STORE(out + d, sum);
    }
}

/* A task is a block of queries of one image, with all heads of each query, whose rows share pages of memory. Returns 0,
 * or 1 without memory. */
int NAME(hpetr_forward)(const problem *p, const VALUE *value, const REAL *loc, const REAL *attn, VALUE *out) {
    const int64_t count = p->levels * p->points, tiles_per_head = (count + TILE - 1) / TILE;
    const int64_t blocks = (p->queries + QUERY_BLOCK - 1) / QUERY_BLOCK, stride = p->heads * p->width;
    level_of_point levels;
    NAME(tile) *memory = aligned_alloc(64, (size_t)(p->threads * tiles_per_head) * sizeof *memory);
    if (!memory || spread_levels(p, &levels)) return free(memory), 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p->threads)
    for (int64_t task = 0; task < p->batch * blocks; task++) {
        NAME(tile) *tiles = memory + omp_get_thread_num() * tiles_per_head;
        const int64_t b = task / blocks, begin = (task % blocks) * QUERY_BLOCK;
        const int64_t end = begin + QUERY_BLOCK < p->queries ? begin + QUERY_BLOCK : p->queries;
        for (int64_t q = begin; q < end; q++)
            for (int64_t m = 0; m < p->heads; m++) {
                const VALUE *head = value + b * p->tokens * stride + m * p->width;
                const int64_t row = (b * p->queries + q) * p->heads + m;
                NAME(locate)(&levels, 0, count, loc + 2 * row * count, attn + row * count, tiles, 0);
                NAME(forward_row)(tiles, tiles + tiles_per_head, head, stride, out + row * p->width, p->width);
            }
    }
    free(memory);
    free(levels.width);
    return 0;
}

#ifdef BACKWARD
/* grad_value is not restrict: the rows of one point may coincide (see `tile`), and each corner's sum must be stored before
 * the next one's is loaded. */
static ALWAYS_INLINE void NAME(backward_chunk)(NAME(tile) *tiles, const NAME(tile) *last, const REAL *value,
                                               int64_t stride, const REAL *grad_out, REAL *grad_value, int vectors) {
    VEC grad[4];
    for (int k = 0; k < vectors; k++) grad[k] = LOAD_VEC(grad_out + k * LANES);
    for (NAME(tile) *s = tiles; s < last; s++)
        for (int j = 0; j < TILE; j++) {
            if (!s->inside[j]) continue;
            ROWS(s, j, stride);
            VEC dot[4];
            for (int c = 0; c < 4; c++) {
                const REAL *row = value + rows[c];
                REAL *grad_row = grad_value + rows[c];
                const REAL weight = s->corner[c][j];
                dot[c] = grad[0] * LOAD_VEC(row);
                for (int k = 1; k < vectors; k++) dot[c] += grad[k] * LOAD_VEC(row + k * LANES);
                for (int k = 0; k < vectors; k++)
                    STORE_VEC(grad_row + k * LANES, LOAD_VEC(grad_row + k * LANES) + weight * grad[k]);
            }
            ADD_LANE_SUMS(s->dot[j], dot);
        }
}

static ALWAYS_INLINE void NAME(backward_row)(NAME(tile) *tiles, const NAME(tile) *last, const REAL *value,
                                             int64_t stride, const REAL *grad_out, REAL *grad_value, int64_t width) {
    int64_t d = 0;
    for (NAME(tile) *s = tiles; s < last; s++) memset(s->dot, 0, sizeof s->dot);
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        NAME(backward_chunk)(tiles, last, value + d, stride, grad_out + d, grad_value + d, 4);
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        NAME(backward_chunk)(tiles, last, value + d, stride, grad_out + d, grad_value + d, 2);
    for (; d + LANES <= width; d += LANES)
        NAME(backward_chunk)(tiles, last, value + d, stride, grad_out + d, grad_value + d, 1);
    for (; d < width; d++)
        for (NAME(tile) *s = tiles; s < last; s++)
            for (int j = 0; j < TILE; j++) {
                if (!s->inside[j]) continue;
                ROWS(s, j, stride);
                for (int c = 0; c < 4; c++) {
                    s->dot[j][c] += grad_out[d] * value[rows[c] + d];
                    grad_value[rows[c] + d] += s->corner[c][j] * grad_out[d];
                }
            }
}

/* Gradients of points i..i+n-1 from the dot products of their tile. */
static ALWAYS_INLINE void NAME(point_gradients)(const level_of_point *levels, int64_t i, int n,
                                                const REAL *restrict attn, const NAME(tile) *restrict s,
                                                REAL *restrict grad_loc, REAL *restrict grad_attn) {
    const double *restrict widths = levels->width + i, *restrict heights = levels->height + i;
    grad_loc += 2 * i, grad_attn += i, attn += i;
#pragma omp simd
    for (int j = 0; j < n; j++) {
        const REAL top_left = s->dot[j][0], top_right = s->dot[j][1], low_left = s->dot[j][2], low_right = s->dot[j][3];
        const REAL gx = s->y0[j] * (s->in_x1[j] * top_right - s->in_x0[j] * top_left) +
                        s->y1[j] * (s->in_x1[j] * low_right - s->in_x0[j] * low_left);
        const REAL gy = s->x0[j] * (s->in_y1[j] * low_left - s->in_y0[j] * top_left) +
                        s->x1[j] * (s->in_y1[j] * low_right - s->in_y0[j] * top_right);
        grad_attn[j] = s->y0[j] * (s->x0[j] * top_left + s->x1[j] * top_right) +
                       s->y1[j] * (s->x0[j] * low_left + s->x1[j] * low_right);
        grad_loc[2 * j] = attn[j] * (REAL)widths[j] * gx;
        grad_loc[2 * j + 1] = attn[j] * (REAL)heights[j] * gy;
    }
}

/* Add tokens begin..end-1 of a dense (S, D) array to those of one head in a (S, M, D) tensor, and clear them. */
static void NAME(flush)(REAL *restrict slice, int64_t stride, REAL *restrict dense, int64_t begin, int64_t end,
                        int64_t width) {
    for (int64_t t = begin; t < end; t++)
        for (int64_t d = 0; d < width; d++) slice[t * stride + d] += dense[t * width + d], dense[t * width + d] = 0;
}

/* Gradients of levels first..last-1 of image b, head m. With `dense`, two (S, D) arrays, it works on a copy of the head's
 * tokens. These are then neighbors in memory, which is faster, and grad_value is summed in blocks, which keeps float32
 * rounding at 1e-7 for tokens that thousands of points share. */
static void NAME(backward_head)(const problem *p, const level_of_point *levels, int64_t b, int64_t m, int64_t first,
                                int64_t last, const REAL *grad_out, const REAL *value, const REAL *loc,
                                const REAL *attn, REAL *grad_value, REAL *grad_loc, REAL *grad_attn, NAME(tile) *tiles,
                                REAL *dense) {
    const int64_t count = p->levels * p->points, begin = first * p->points, end = last * p->points, width = p->width;
    const int64_t stride = p->heads * width, head = b * p->tokens * stride + m * width;
    const int64_t first_token = level_start(p, first), last_token = level_start(p, last);
    const int64_t tile_count = (end - begin + TILE - 1) / TILE;
    const REAL *rows = value + head;
    REAL *grad_rows = grad_value + head;
    if (dense) {
        rows = dense, grad_rows = dense + p->tokens * width;
        for (int64_t t = first_token; t < last_token; t++)
            memcpy(dense + t * width, value + head + t * stride, (size_t)width * sizeof(REAL));
        memset(grad_rows + first_token * width, 0, (size_t)((last_token - first_token) * width) * sizeof(REAL));
    }
    for (int64_t q = 0; q < p->queries; q++) {
        const int64_t row = (b * p->queries + q) * p->heads + m;
        const REAL *weights = attn + row * count;
        NAME(locate)(levels, begin, end, loc + 2 * row * count, weights, tiles, 1);
        NAME(backward_row)(tiles, tiles + tile_count, rows, dense ? width : stride, grad_out + row * width, grad_rows,
                           width);
        REAL *loc_row = grad_loc + 2 * row * count, *attn_row = grad_attn + row * count;
        int64_t i = begin;
        for (const NAME(tile) *s = tiles; s < tiles + tile_count; s++, i += TILE) {
            if (i + TILE <= end) NAME(point_gradients)(levels, i, TILE, weights, s, loc_row, attn_row);
            else NAME(point_gradients)(levels, i, (int)(end - i), weights, s, loc_row, attn_row);
        }
        if (!dense || ((q + 1) % QUERY_BLOCK && q + 1 < p->queries)) continue;
        for (int64_t l = first; l < last; l++)
            if (q + 1 == p->queries || (q + 1) / QUERY_BLOCK % blocks_per_flush(p, l) == 0)
                NAME(flush)(grad_value + head, stride, grad_rows, level_start(p, l), level_start(p, l + 1), width);
    }
}

/* grad_value is zero on entry. A task is one head of one image, or one level of it if that shares the work better. No
 * other task writes its slice of grad_value: there is no race, and any number of threads gives the same bits. */
int NAME(hpetr_backward)(const problem *p, const REAL *grad_out, const REAL *value, const REAL *loc, const REAL *attn,
                         REAL *grad_value, REAL *grad_loc, REAL *grad_attn) {
    const int64_t count = p->levels * p->points, slices = p->batch * p->heads;
    const int64_t groups = slices % p->threads ? p->levels : 1;
    const int64_t tiles_per_head = (count + TILE - 1) / TILE;
    const int64_t dense_size = p->queries * count >= p->tokens ? 2 * p->tokens * p->width : 0;
    level_of_point levels;
    NAME(tile) *memory = aligned_alloc(64, (size_t)(p->threads * tiles_per_head) * sizeof *memory);
    REAL *dense = dense_size ? malloc((size_t)(p->threads * dense_size) * sizeof *dense) : NULL;
    if (!memory || (dense_size && !dense) || spread_levels(p, &levels)) return free(memory), free(dense), 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p->threads)
    for (int64_t task = 0; task < slices * groups; task++) {
        const int64_t b = task % slices / p->heads, m = task % slices % p->heads, thread = omp_get_thread_num();
        const int64_t first = task / slices * (p->levels / groups), last = first + p->levels / groups;
        NAME(backward_head)(p, &levels, b, m, first, last, grad_out, value, loc, attn, grad_value, grad_loc, grad_attn,
                            memory + thread * tiles_per_head, dense ? dense + thread * dense_size : NULL);
    }
    free(memory);
    free(dense);
    free(levels.width);
    return 0;
}
#endif
#undef ROWS
#undef NAME
#undef REAL
#undef VALUE
#undef LANES
#undef VEC
#undef LOAD
#undef STORE
#undef LOAD_VEC
#undef STORE_VEC
#undef ADD_LANE_SUMS

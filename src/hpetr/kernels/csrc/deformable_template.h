/* One instantiation of deformable sampling; included by deformable_cpu.c once per dtype, with these macros set:
 *   REAL    arithmetic type            VALUE   storage type of value and out
 *   LANES   REALs in one vector        VEC     vector of LANES REALs (need not be aligned)
 *   LOAD_VEC / STORE_VEC / LOAD / STORE   conversions between VALUE and VEC / REAL
 *   NAME(x) x with the dtype's suffix  BACKWARD  defined when the backward pass is wanted (VALUE is then REAL)
 *
 * The head width is walked in chunks of 4, 2 and 1 vectors and then single elements, so each chunk accumulates in
 * registers whatever D is: D = 32 floats is one chunk of four, D = 16 one of two.
 */

#ifndef ARRAYS
/* Where the points of one query and head fall, as arrays over the points. A corner outside its map has weight 0 and
 * stands on its neighbour inside, a token the point reads anyway: no branch in the inner loops, and no foreign NaN can
 * leak in. A point wholly outside has inside = 0 and is not read at all. */
#define ARRAYS
typedef struct {
    int32_t *inside, *token, *right, *below; /* top left corner's token; steps to the right column and the lower row */
    double *width, *height, *start;          /* of the point's level */
} places;
#endif

typedef struct {
    REAL *x0, *x1, *y0, *y1; /* bilinear weight of the left, right column and top, bottom row; 0 outside */
    REAL *corner[4];         /* top left, top right, bottom left, bottom right: bilinear times attention weight */
    REAL *dot;               /* backward only: (points, 4), <grad_out, corner's row> */
} NAME(weights);

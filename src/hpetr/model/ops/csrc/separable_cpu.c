/* Separable convolutions on the CPU, forward: [1x1 and clamp,] depthwise 3x3 and clamp, 1x1 and clamp [, 1x1] [+ input].
 * ops/separable.py checks the arguments. Everything is float32 with the channels last and contiguous.
 *
 * Output is computed row by row, so that the values between the convolutions stay in the cache. In MobileNetV2's first
 * blocks they are six times as large as input and output together, and moving them takes longer than the arithmetic.
 * Needs the vector extensions of GCC and clang.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Width of a vector, and pixels and vectors of channels in a block of the product, whose sums fill the registers. */
#if defined(__AVX512F__)
#define WIDTH 16
#define PIXELS 8
#elif defined(__AVX__)
#define WIDTH 8
#define PIXELS 4
#else
#define WIDTH 4
#ifdef __aarch64__
#define PIXELS 8
#else
#define PIXELS 4
#endif
#endif
#define VECTORS 3
#define PANEL (WIDTH * VECTORS) /* output channels of a block */

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH), may_alias));

/* ops/separable.py packs it. Channels: inputs -> hidden (equal without expansion) -> outputs -> last (0: none). Windows
 * of the depthwise convolution's output row or column n start at stride x n - before. */
typedef struct {
    int64_t batch, height, width, out_height, out_width;
    int64_t inputs, hidden, outputs, last, expands, residual;
    int64_t stride, before;
    int64_t pixel, threads; /* pixel: floats from one pixel of the output to the next */
    float expand_low, expand_high, depthwise_low, depthwise_high, project_low, project_high;
} block;

typedef struct {
    float *weight; /* panels of (inputs, PANEL) */
    float *bias;   /* whole panels */
    int64_t inputs, outputs;
    float low, high;
} product;

static inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/* NaN stays NaN: of a NaN, max and min of x86 return the second operand. */
static ALWAYS_INLINE vector clamped(vector x, float low, float high) {
    const vector lows = (vector){} + low, highs = (vector){} + high;
#if defined(__AVX512F__)
    return (vector)_mm512_min_ps((__m512)highs, _mm512_max_ps((__m512)lows, (__m512)x));
#elif defined(__AVX__)
    return (vector)_mm256_min_ps((__m256)highs, _mm256_max_ps((__m256)lows, (__m256)x));
#else
    const integers below = (integers)(x < lows), above = (integers)(x > highs);
    x = (vector)((below & (integers)lows) | (~below & (integers)x));
    return (vector)((above & (integers)highs) | (~above & (integers)x));
#endif
}

/* out[m][n] = clamp(bias[n] + sum over k of x[m][k] w[k][n]) of `count` pixels and `columns` channels in `vectors`. */
static ALWAYS_INLINE void multiply_block(const int count, const int vectors, const product *p, const float *x,
                                         int64_t x_pixel, const float *w, const float *bias, float *out,
                                         int64_t out_pixel, int64_t columns) {
    vector sum[PIXELS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < count; m++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[m][v] = ((const vector *)bias)[v];
    for (int64_t k = 0; k < p->inputs; k++, w += PANEL) {
        vector row[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) row[v] = ((const vector *)w)[v];
#pragma GCC unroll 8
        for (int m = 0; m < count; m++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[m][v] += x[m * x_pixel + k] * row[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        vector result[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) result[v] = clamped(sum[m][v], p->low, p->high);
        float *target = out + m * out_pixel;
        const int64_t rest = columns - (vectors - 1) * WIDTH;
        const vector last = result[vectors - 1];
#pragma GCC unroll 3
        for (int v = 0; v < vectors - 1; v++) ((vector *)target)[v] = result[v];
        if (rest == WIDTH) ((vector *)target)[vectors - 1] = last;
        else memcpy(target + (vectors - 1) * WIDTH, &last, (size_t)rest * sizeof(float));
    }
}

static ALWAYS_INLINE void multiply_panel(const int vectors, const product *p, const float *x, int64_t x_pixel,
                                         const float *w, const float *bias, float *out, int64_t out_pixel,
                                         int64_t columns, int64_t count) {
    int64_t m = 0;
#define BLOCKS(pixels)                                                                                                 \
    for (; m + (pixels) <= count; m += (pixels))                                                                       \
    multiply_block(pixels, vectors, p, x + m * x_pixel, x_pixel, w, bias, out + m * out_pixel, out_pixel, columns)
    BLOCKS(PIXELS);
    BLOCKS(PIXELS / 2);
    BLOCKS(2);
    BLOCKS(1);
#undef BLOCKS
}

/* x (count, inputs) -> out (count, outputs), `x_pixel` and `out_pixel` floats apart. */
static void multiply(const product *p, const float *x, int64_t x_pixel, float *out, int64_t out_pixel, int64_t count) {
    for (int64_t n = 0; n < p->outputs; n += PANEL) {
        const int64_t rest = p->outputs - n, columns = rest < PANEL ? rest : PANEL;
        const float *w = p->weight + n * p->inputs, *bias = p->bias + n;
#define PANELS(vectors) multiply_panel(vectors, p, x, x_pixel, w, bias, out + n, out_pixel, columns, count)
        if (columns > 2 * WIDTH) PANELS(3);
        else if (columns > WIDTH) PANELS(2);
        else PANELS(1);
#undef PANELS
    }
}

/* Three rows of `channels` (whole vectors), which start with the first window's pixel -> one row. */
static void depthwise(const block *b, const float *const *rows, const float *weight, const float *bias,
                      int64_t channels, float *out) {
    for (int64_t c = 0; c < channels; c += WIDTH) {
        vector w[9];
        for (int i = 0; i < 9; i++) w[i] = *(const vector *)(weight + i * channels + c);
        const vector start = *(const vector *)(bias + c);
        const float *top = rows[0] + c, *middle = rows[1] + c, *bottom = rows[2] + c;
        for (int64_t o = 0; o < b->out_width; o++) {
            const int64_t at = o * b->stride * channels;
            vector sum = start, other = {};
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) {
                sum += *(const vector *)(top + at + j * channels) * w[j];
                other += *(const vector *)(middle + at + j * channels) * w[3 + j];
                sum += *(const vector *)(bottom + at + j * channels) * w[6 + j];
            }
            *(vector *)(out + o * channels + c) = clamped(sum + other, b->depthwise_low, b->depthwise_high);
        }
    }
}

/* Zeros for the panels of (outputs, inputs) and their biases. Returns 0, or 1 without memory. */
static int reserve(product *p, int64_t outputs, int64_t inputs) {
    const int64_t padded = whole(outputs, PANEL);
    p->weight = calloc((size_t)(padded * (inputs + 1)), sizeof(float));
    p->bias = p->weight + padded * inputs, p->inputs = inputs, p->outputs = outputs;
    return !p->weight;
}

/* Copy weight (outputs, inputs) and bias (outputs), which may be NULL, to panels; the threads share the work. */
static void pack(product *p, const float *weight, const float *bias) {
#pragma omp for nowait
    for (int64_t n = 0; n < p->outputs; n += PANEL) {
        const int64_t rest = p->outputs - n, columns = rest < PANEL ? rest : PANEL;
        for (int64_t first = 0; first < p->inputs; first += 16) { /* one cache line of each row */
            const int64_t end = first + 16 < p->inputs ? first + 16 : p->inputs;
            for (int64_t i = 0; i < columns; i++)
                for (int64_t k = first; k < end; k++)
                    p->weight[n * p->inputs + k * PANEL + i] = weight[(n + i) * p->inputs + k];
        }
        if (bias) memcpy(p->bias + n, bias + n, (size_t)columns * sizeof(float));
    }
}

/* Write row y of the depthwise convolution's input, or zeros outside the image, into `slot`, whose margins are zeros. */
static void fill_row(const block *b, const product *expand, const float *image, int64_t y, float *slot,
                     int64_t channels) {
    float *inside = slot + b->before * channels;
    if (y < 0 || y >= b->height) {
        memset(inside, 0, (size_t)(b->width * channels) * sizeof(float));
        return;
    }
    const float *x = image + y * b->width * b->inputs;
    if (b->expands)
        multiply(expand, x, b->inputs, inside, channels, b->width);
    else
        for (int64_t i = 0; i < b->width; i++)
            memcpy(inside + i * channels, x + i * b->inputs, (size_t)b->inputs * sizeof(float));
}

/* x (batch, height, width, inputs) -> out (batch, out_height, out_width, pixel). Weights have torch's layout: (outputs,
 * inputs) of 1x1, (hidden, 3, 3) of depthwise; biases may be NULL. Returns 0, or 1 without memory. */
int hpetr_separable_f32(const block *b, const float *x, const float *expand_weight, const float *expand_bias,
                        const float *depthwise_weight, const float *depthwise_bias, const float *project_weight,
                        const float *project_bias, const float *last_weight, const float *last_bias, float *out) {
    const int64_t channels = whole(b->hidden, WIDTH), middle = whole(b->outputs, WIDTH);
    const int64_t window = (b->out_width - 1) * b->stride + 3; /* pixels under a row of windows */
    const int64_t row = (window > b->width + b->before ? window : b->width + b->before) * channels;
    const int64_t scratch = 3 * row + b->out_width * (channels + middle);
    product expand = {.low = b->expand_low, .high = b->expand_high};
    product project = {.low = b->project_low, .high = b->project_high};
    product last = {.low = -__builtin_inff(), .high = __builtin_inff()};
    float *kernel = calloc((size_t)(10 * channels), sizeof(float));
    int failed = !kernel;
    if (b->expands) failed |= reserve(&expand, b->hidden, b->inputs);
    failed |= reserve(&project, b->outputs, b->hidden);
    if (b->last) failed |= reserve(&last, b->last, b->outputs);
    if (!failed) {
        const int64_t rows = b->batch * b->out_height;
#pragma omp parallel num_threads((int)b->threads) reduction(| : failed)
        {
            if (b->expands) pack(&expand, expand_weight, expand_bias);
            pack(&project, project_weight, project_bias);
            if (b->last) pack(&last, last_weight, last_bias);
#pragma omp single /* ends with a barrier: everything is packed */
            {
                for (int64_t c = 0; c < b->hidden; c++)
                    for (int i = 0; i < 9; i++) kernel[i * channels + c] = depthwise_weight[c * 9 + i];
                if (depthwise_bias) memcpy(kernel + 9 * channels, depthwise_bias, (size_t)b->hidden * sizeof(float));
            }
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
            float *memory = calloc((size_t)scratch, sizeof(float)), *slots[3];
            if (!memory) failed = 1, end = begin;
            float *spatial = memory + 3 * row, *between = spatial + b->out_width * channels;
            for (int i = 0; i < 3; i++) slots[i] = memory + i * row;
            int64_t image = -1, filled = 0; /* rows of `image` before `filled` are computed */
            for (int64_t r = begin; r < end; r++) {
                const int64_t y = r % b->out_height * b->stride - b->before;
                const float *pixels = x + r / b->out_height * b->height * b->width * b->inputs;
                if (r / b->out_height != image) image = r / b->out_height, filled = y;
                if (filled < y) filled = y;
                for (; filled < y + 3; filled++) fill_row(b, &expand, pixels, filled, slots[(filled + 3) % 3], channels);
                const float *const windows[3] = {slots[(y + 3) % 3], slots[(y + 4) % 3], slots[(y + 5) % 3]};
                depthwise(b, windows, kernel, kernel + 9 * channels, channels, spatial);
                float *target = out + r * b->out_width * b->pixel;
                if (b->last) {
                    multiply(&project, spatial, channels, between, middle, b->out_width);
                    multiply(&last, between, middle, target, b->pixel, b->out_width);
                } else {
                    multiply(&project, spatial, channels, target, b->pixel, b->out_width);
                }
                if (b->residual) { /* stride 1, and as many channels as the input */
                    const float *own = pixels + r % b->out_height * b->width * b->inputs;
                    for (int64_t i = 0; i < b->width; i++)
                        for (int64_t c = 0; c < b->inputs; c++) target[i * b->pixel + c] += own[i * b->inputs + c];
                }
            }
            free(memory);
        }
    }
    free(expand.weight), free(project.weight), free(last.weight), free(kernel);
    return failed;
}

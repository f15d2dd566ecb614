/* Selective attention in tiles of BLOCK queries by BLOCK columns, forward and backward, float32.
 *
 * Letters as in selective.py: B batch, H query heads, G key/value heads, T queries, S columns, D head width (a multiple
 * of 16 here). The query of row t stands in column S - T + t. Contiguous inputs: q (B,H,T,D), k and v (B,G,S,D).
 *
 * Selections of the selector head are summed per block of queries first (`block_sums`); a prefix over blocks gives F at
 * the start of each block (`offsets`), so that every tile can rebuild its part of F alone, in float32, from one more
 * product q[sel] k^T. No (T, S) array is ever stored.
 *
 * Each output element is summed by one thread in an order that depends on the shapes alone: results are bitwise equal
 * for any number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4 /* vectors of a register tile; ROWS(n) rows beside n of them fill the register file */
#define ROWS(n) ((n) == 4 ? 6 : 8)
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#define ROWS(n) 6
#else
#define LANES 4
#define WIDE 4
#define ROWS(n) ((n) == 4 ? 4 : 6)
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define BLOCK 64
#define SPAN (BLOCK / LANES)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec x) { *(loose *)p = x; }
INLINE vec fill(float x) { return x - (vec){0}; }
INLINE vec choose(ivec where, vec x, vec other) { return (vec)((where & (ivec)x) | (~where & (ivec)other)); }
INLINE vec maximum(vec x, vec y) { return choose(x > y, x, y); }

INLINE float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    for (int n = 1; n < LANES; n++) best = x[n] > best ? x[n] : best;
    return best;
#endif
}

INLINE float total(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = x[0];
    for (int n = 1; n < LANES; n++) sum += x[n];
    return sum;
#endif
}

/* e^x for x up to about 80, relative error below 2e-7; exactly 0 below -87 (also for -inf). */
INLINE vec exponential(vec x) {
    const vec magic = fill(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer kept in the low bits */
    vec shifted = x * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec scaled = (ivec)p + ((ivec)shifted << 23);
    return (vec)(scaled & (x > fill(-87.0f)));
}

/* C (rows x n vectors) [+]= A (rows x depth, any strides) B (depth x n vectors). rows and n are constants. */
INLINE void product_tile(const int rows, const int n, long depth, const float *a, long a_row, long a_deep,
                         const float *b, long b_row, float *c, long c_row, const int add) {
    vec sum[8][4];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int m = 0; m < n; m++) sum[r][m] = add ? load(c + r * c_row + m * LANES) : (vec){0};
    for (long d = 0; d < depth; d++) {
        vec right[4];
#pragma GCC unroll 16
        for (int m = 0; m < n; m++) right[m] = load(b + d * b_row + m * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vec left = fill(a[r * a_row + d * a_deep]);
#pragma GCC unroll 16
            for (int m = 0; m < n; m++) sum[r][m] += left * right[m];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int m = 0; m < n; m++) store(c + r * c_row + m * LANES, sum[r][m]);
}

INLINE void product_strip(const int n, long rows, long depth, const float *a, long a_row, long a_deep, const float *b,
                          long b_row, float *c, long c_row, const int add) {
    long r = 0;
#define STEP(count)                                                                                                    \
    for (; r + (count) <= rows; r += (count))                                                                          \
        product_tile(count, n, depth, a + r * a_row, a_row, a_deep, b, b_row, c + r * c_row, c_row, add);
    STEP(ROWS(n))
    STEP(4)
    STEP(2)
    STEP(1)
#undef STEP
}

/* C (rows x columns) [+]= A (rows x depth) B (depth x columns); columns a multiple of LANES. */
#define PRODUCT(name, add)                                                                                             \
    static void name(long rows, long columns, long depth, const float *a, long a_row, long a_deep, const float *b,    \
                     long b_row, float *c, long c_row) {                                                               \
        long m = 0;                                                                                                    \
        for (; m + WIDE * LANES <= columns; m += WIDE * LANES)                                                         \
            product_strip(WIDE, rows, depth, a, a_row, a_deep, b + m, b_row, c + m, c_row, add);                       \
        if (WIDE > 2 && m + 2 * LANES <= columns) {                                                                    \
            product_strip(2, rows, depth, a, a_row, a_deep, b + m, b_row, c + m, c_row, add);                          \
            m += 2 * LANES;                                                                                            \
        }                                                                                                              \
        if (m < columns) product_strip(1, rows, depth, a, a_row, a_deep, b + m, b_row, c + m, c_row, add);             \
    }
PRODUCT(multiply, 0)
PRODUCT(multiply_add, 1)

typedef struct {
    const float *q, *k, *v;
    const void *mask;       /* (B, T, S) bytes or floats, last stride 1; NULL is causal */
    const uint8_t *protect; /* (B, S) */
    const float *penalty;   /* (B, S) */
    float *offsets;         /* (B, blocks of queries + 1, S): F at the start of each block, then after all queries */
    float *memory;          /* (B, T): sum of 1 - min(F, tau) / tau over the columns a query sees; NULL is not wanted */
    const float *d_memory;  /* (B, T) or NULL */
    float *kt, *vt;         /* (B, G, blocks of columns, D, BLOCK): scaled keys and values, transposed */
    float *out, *lse;       /* (B, T, H, D) and (B, H, T) */
    const float *d_out;     /* (B, H, T, D) */
    float *delta;           /* (B, H, T): sum over D of out d_out */
    float *d_q_parts;       /* (parts, B, H, T, D) */
    float *d_q, *d_k, *d_v; /* like q, k, v */
    long mask_b, mask_t;    /* strides in elements */
    int mask_kind;          /* 0 causal, 1 bytes (nonzero may attend), 2 additive floats (-inf excludes) */
    int B, H, G, T, S, D, selector, parts, threads;
    float scaling, tau;
} Problem;

int selective_block(void) { return BLOCK; }

INLINE int least(int x, int y) { return x < y ? x : y; }
static int query_blocks(const Problem *p) { return (p->T + BLOCK - 1) / BLOCK; }
static int column_blocks(const Problem *p) { return (p->S + BLOCK - 1) / BLOCK; }

enum { EMPTY, FULL, PARTIAL };

/* Whether tile (i, j) holds nothing, everything, or what `bias` then says: 0 or the additive mask, -inf where excluded. */
static int tile_mask(const Problem *p, int b, int i, int j, float *bias) {
    int rows = least(BLOCK, p->T - i * BLOCK), columns = least(BLOCK, p->S - j * BLOCK);
    int own = p->S - p->T + i * BLOCK - j * BLOCK; /* the first row's own column, counted from the tile's first */
    if (p->mask_kind == 0) {
        if (own + rows - 1 < 0) return EMPTY;
        if (own >= BLOCK && columns == BLOCK) return FULL;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < BLOCK; c++) bias[r * BLOCK + c] = c <= own + r ? 0.0f : -INFINITY;
        return PARTIAL;
    }
    int excluded = columns < BLOCK, allowed = 0;
    long start = b * p->mask_b + (long)i * BLOCK * p->mask_t + j * BLOCK;
    for (int r = 0; r < rows; r++) {
        float *row = bias + r * BLOCK;
        if (p->mask_kind == 1) {
            const uint8_t *from = (const uint8_t *)p->mask + start + r * p->mask_t;
            int count = 0;
            for (int c = 0; c < columns; c++) count += from[c] != 0;
            for (int c = 0; c < columns; c++) row[c] = from[c] ? 0.0f : -INFINITY;
            allowed |= count > 0;
            excluded |= count < columns;
        } else {
            const float *from = (const float *)p->mask + start + r * p->mask_t;
            int count = 0;
            for (int c = 0; c < columns; c++) count += from[c] > -INFINITY;
            memcpy(row, from, columns * sizeof(float));
            allowed |= count > 0;
            excluded = 1;
        }
        for (int c = columns; c < BLOCK; c++) row[c] = -INFINITY;
    }
    if (!allowed) return EMPTY;
    return excluded || own < BLOCK ? PARTIAL : FULL;
}

/* From the selector's logits of tile (i, j) and F at its start (`run`): bias becomes mask - F, gate 1 where a selection
 * was made, and run goes on to F after the tile. bias and gate may be NULL where only the sums matter. memory (BLOCK)
 * takes the sum of 1 - min(F, tau) / tau of each row; d_F adds the gradient that d_memory (of the rows) sends to F. */
INLINE void tile_penalty(const Problem *p, int b, int i, int j, int kind, const float *logits, float *run, const float *mask,
                         float *bias, float *gate, float *memory, const float *d_memory, float *d_F) {
    const vec rate = fill(1.0f / p->tau);
    int rows = least(BLOCK, p->T - i * BLOCK), own = p->S - p->T + (i - j) * BLOCK;
    float open[BLOCK];
    const uint8_t *protect = p->protect + (long)b * p->S + j * BLOCK;
    for (int c = 0; c < BLOCK; c++) open[c] = j * BLOCK + c < p->S && !protect[c] ? 1.0f : 0.0f;
    ivec lane;
    for (int n = 0; n < LANES; n++) lane[n] = n;
    for (int m = 0; m < SPAN; m++) {
        vec F = load(run + m * LANES), may = load(open + m * LANES);
        for (int r = 0; r < rows; r++) {
            long at = r * BLOCK + m * LANES;
            vec l = load(logits + at), chosen, living = fill(1.0f) - F * rate;
            if (kind == FULL) {
                if (bias) store(bias + at, -F);
            } else {
                vec allowed = load(mask + at);
                l += allowed;
                if (memory || d_memory)
                    living = (vec)((ivec)living & (allowed > fill(-INFINITY)) & (lane + m * LANES <= own + r));
                if (bias) store(bias + at, allowed - F);
                l = (vec)((ivec)l & (lane + m * LANES < own + r)); /* strictly before the query's own column */
            }
            if (memory) memory[r] += total(maximum(living, (vec){0}));
            if (d_memory) store(d_F + at, load(d_F + at) - choose(living > (vec){0}, fill(d_memory[r]) * rate, (vec){0}));
            chosen = choose(l > (vec){0}, l, (vec){0}) * may;
            if (gate) store(gate + at, choose(chosen > (vec){0}, fill(1.0f), (vec){0}));
            F += chosen;
        }
        store(run + m * LANES, F);
    }
}

/* One block of columns: from (columns, D) to (D, BLOCK), zero beyond S. */
static void transpose_block(const Problem *p, const float *from, float *to, float scale, long task) {
    int blocks = column_blocks(p);
    long head = task / blocks, j = task % blocks;
    int columns = least(BLOCK, p->S - j * BLOCK);
    const float *source = from + (head * p->S + j * BLOCK) * p->D;
    float *target = to + task * p->D * BLOCK;
    if (columns < BLOCK) memset(target, 0, sizeof(float) * p->D * BLOCK);
    for (int d0 = 0; d0 < p->D; d0 += 16)
        for (int c = 0; c < columns; c++)
            for (int d = d0; d < d0 + 16; d++) target[d * BLOCK + c] = source[c * p->D + d] * scale;
}

static float *scratch(size_t floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

static int block_sums(const Problem *p) {
    int blocks = query_blocks(p), failed = 0;
    long row = p->S, tasks = (long)p->B * blocks, group = p->H / p->G;
#pragma omp parallel num_threads(p->threads)
    {
        float *logits = scratch(2 * BLOCK * BLOCK), *mask = logits + BLOCK * BLOCK;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            if (!logits) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            int b = task / blocks, i = blocks - 1 - task % blocks; /* the longest rows first */
            int rows = least(BLOCK, p->T - i * BLOCK);
            const float *q = p->q + (((long)b * p->H + p->selector) * p->T + i * BLOCK) * p->D;
            float *sums = p->offsets + ((long)b * (blocks + 1) + i + 1) * row;
            for (int j = 0; j < column_blocks(p); j++) {
                float run[BLOCK] = {0};
                int kind = tile_mask(p, b, i, j, mask);
                if (kind != EMPTY) {
                    const float *kt = p->kt + (((long)b * p->G + p->selector / group) * column_blocks(p) + j) * p->D * BLOCK;
                    multiply(rows, BLOCK, p->D, q, p->D, 1, kt, BLOCK, logits, BLOCK);
                    tile_penalty(p, b, i, j, kind, logits, run, mask, NULL, NULL, NULL, NULL, NULL);
                }
                memcpy(sums + j * BLOCK, run, sizeof(float) * least(BLOCK, p->S - j * BLOCK));
            }
        }
        free(logits);
    }
    for (int b = 0; b < p->B; b++) {
        float *first = p->offsets + (long)b * (blocks + 1) * row;
        memcpy(first, p->penalty + b * row, sizeof(float) * row);
        for (int i = 0; i < blocks; i++)
            for (long s = 0; s < row; s++) first[(i + 1) * row + s] += first[i * row + s];
    }
    return failed;
}

/* F at the start of tile (i, j). */
static void start_of_tile(const Problem *p, int b, int i, int j, float *run) {
    int columns = least(BLOCK, p->S - j * BLOCK);
    memset(run, 0, sizeof(float) * BLOCK);
    memcpy(run, p->offsets + ((long)b * (query_blocks(p) + 1) + i) * p->S + j * BLOCK, sizeof(float) * columns);
}

/* One tile of softmax with a running maximum; logits become weights relative to it. */
static void softmax_tile(int rows, int D, float *logits, const float *bias, float *peak, float *mass, float *sum) {
    for (int r = 0; r < rows; r++) {
        vec x[SPAN], top, weight = {0};
        for (int m = 0; m < SPAN; m++) x[m] = load(logits + r * BLOCK + m * LANES) + load(bias + r * BLOCK + m * LANES);
        top = x[0];
        for (int m = 1; m < SPAN; m++) top = maximum(x[m], top);
        float highest = largest(top);
        if (highest > peak[r]) {
            float shrink = peak[r] == -INFINITY ? 0.0f : expf(peak[r] - highest);
            peak[r] = highest;
            mass[r] *= shrink;
            for (int d = 0; d < D; d += LANES) store(sum + r * D + d, load(sum + r * D + d) * shrink);
        }
        float base = peak[r] == -INFINITY ? 0.0f : peak[r];
        for (int m = 0; m < SPAN; m++) {
            vec w = exponential(x[m] - base);
            store(logits + r * BLOCK + m * LANES, w);
            weight += w;
        }
        mass[r] += total(weight);
    }
}

int selective_forward(const Problem *p) {
    int blocks = query_blocks(p), failed, H = p->H, D = p->D, group = p->H / p->G;
    long tasks = (long)p->B * blocks;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (long task = 0; task < (long)p->B * p->G * column_blocks(p); task++)
        transpose_block(p, p->k, p->kt, p->scaling, task);
    failed = block_sums(p);
#pragma omp parallel num_threads(p->threads)
    {
        const long tile = BLOCK * BLOCK;
        float *selector = scratch(3 * tile + (long)H * BLOCK * (D + 2));
        float *other = selector + tile, *bias = other + tile, *sums = bias + tile;
        float *peaks = sums + (long)H * BLOCK * D, *masses = peaks + H * BLOCK;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            if (!selector) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            int b = task / blocks, i = blocks - 1 - task % blocks, rows = least(BLOCK, p->T - i * BLOCK);
            float living[BLOCK] = {0}, *memory = p->memory ? living : NULL;
            memset(sums, 0, sizeof(float) * H * BLOCK * D);
            for (int n = 0; n < H * BLOCK; n++) peaks[n] = -INFINITY, masses[n] = 0.0f;
            for (int j = 0; j < column_blocks(p); j++) {
                int kind = tile_mask(p, b, i, j, bias), columns = least(BLOCK, p->S - j * BLOCK);
                if (kind == EMPTY) continue;
                float run[BLOCK];
                start_of_tile(p, b, i, j, run);
                for (int n = 0; n < H; n++) { /* the selector first: the others need its F */
                    int h = n == 0 ? p->selector : n <= p->selector ? n - 1 : n;
                    long kv = (long)b * p->G + h / group;
                    float *logits = n == 0 ? selector : other;
                    multiply(rows, BLOCK, D, p->q + (((long)b * H + h) * p->T + i * BLOCK) * D, D, 1,
                             p->kt + (kv * column_blocks(p) + j) * D * BLOCK, BLOCK, logits, BLOCK);
                    if (n == 0) tile_penalty(p, b, i, j, kind, logits, run, bias, bias, NULL, memory, NULL, NULL);
                    float *sum = sums + (long)h * BLOCK * D;
                    softmax_tile(rows, D, logits, bias, peaks + h * BLOCK, masses + h * BLOCK, sum);
                    multiply_add(rows, D, columns, logits, BLOCK, 1, p->v + (kv * p->S + j * BLOCK) * D, D, sum, D);
                }
            }
            if (memory) memcpy(p->memory + (long)b * p->T + i * BLOCK, memory, sizeof(float) * rows);
            for (int h = 0; h < H; h++)
                for (int r = 0; r < rows; r++) {
                    float mass = masses[h * BLOCK + r], scale = mass > 0.0f ? 1.0f / mass : 0.0f;
                    int t = i * BLOCK + r;
                    float *out = p->out + (((long)b * p->T + t) * H + h) * D, *sum = sums + ((long)h * BLOCK + r) * D;
                    for (int d = 0; d < D; d++) out[d] = sum[d] * scale;
                    p->lse[((long)b * H + h) * p->T + t] = mass > 0.0f ? peaks[h * BLOCK + r] + logf(mass) : INFINITY;
                }
        }
        free(selector);
    }
    return failed;
}

/* weights = e^(logits + bias - lse);  d_weights becomes d_logits = weights (d_weights - delta);  d_F takes -d_logits. */
static void gradient_tile(int rows, float *logits, float *d_weights, const float *bias, const float *lse, const float *delta,
                          float *d_F) {
    for (int r = 0; r < rows; r++) {
        vec level = fill(lse[r]), shift = fill(delta[r]);
        for (int m = 0; m < SPAN; m++) {
            long at = r * BLOCK + m * LANES;
            vec w = exponential(load(logits + at) + load(bias + at) - level);
            vec d = w * (load(d_weights + at) - shift);
            store(logits + at, w);
            store(d_weights + at, d);
            store(d_F + at, load(d_F + at) - d);
        }
    }
}

int selective_backward(const Problem *p) {
    int blocks = query_blocks(p), spans = column_blocks(p), failed = 0, H = p->H, D = p->D, group = p->H / p->G;
    long size = (long)p->B * H * p->T * D, tasks = (long)p->B * p->parts;
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(static) nowait
        for (long task = 0; task < (long)p->B * p->G * spans; task++) {
            transpose_block(p, p->k, p->kt, p->scaling, task);
            transpose_block(p, p->v, p->vt, 1.0f, task);
        }
#pragma omp for schedule(static) nowait
        for (long row = 0; row < (long)p->B * H * p->T; row++) {
            long head = row / p->T, t = row % p->T;
            const float *out = p->out + ((head / H * p->T + t) * H + head % H) * D, *d_out = p->d_out + row * D;
            vec sum = {0};
            for (int d = 0; d < D; d += LANES) sum += load(out + d) * load(d_out + d);
            p->delta[row] = total(sum);
        }
    }
#pragma omp parallel num_threads(p->threads)
    {
        const long tile = BLOCK * BLOCK, heads = (long)p->G * BLOCK * D;
        float *selector = scratch(7 * tile + 2 * heads);
        float *d_selector = selector + tile, *logits = d_selector + tile, *d_logits = logits + tile;
        float *bias = d_logits + tile, *gate = bias + tile, *d_F = gate + tile, *d_k = d_F + tile, *d_v = d_k + heads;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            if (!selector) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            int b = task / p->parts, part = task % p->parts;
            float *d_q = p->d_q_parts + part * size;
            memset(d_q + (long)b * H * p->T * D, 0, sizeof(float) * H * p->T * D);
            for (int j = part; j < spans; j += p->parts) {
                int columns = least(BLOCK, p->S - j * BLOCK);
                float later[BLOCK] = {0}; /* sum of dF over the queries after the present one */
                memset(d_k, 0, sizeof(float) * 2 * heads);
                for (int i = blocks - 1; i >= 0; i--) {
                    int kind = tile_mask(p, b, i, j, bias), rows = least(BLOCK, p->T - i * BLOCK);
                    if (kind == EMPTY) continue;
                    float run[BLOCK];
                    start_of_tile(p, b, i, j, run);
                    memset(d_F, 0, sizeof(float) * tile);
                    for (int n = 0; n <= H; n++) { /* the selector's weights first, its products last */
                        int h = n == 0 || n == H ? p->selector : n <= p->selector ? n - 1 : n;
                        long head = (long)b * H + h, kv = (long)b * p->G + h / group, from = head * p->T + i * BLOCK;
                        float *l = n == 0 || n == H ? selector : logits, *d_l = n == 0 || n == H ? d_selector : d_logits;
                        const float *q = p->q + from * D, *d_out = p->d_out + from * D;
                        float *d_v_head = d_v + (long)(h / group) * BLOCK * D, *d_k_head = d_k + (long)(h / group) * BLOCK * D;
                        if (n < H) {
                            long packed = (kv * spans + j) * D * BLOCK;
                            multiply(rows, BLOCK, D, q, D, 1, p->kt + packed, BLOCK, l, BLOCK);
                            if (n == 0)
                                tile_penalty(p, b, i, j, kind, l, run, bias, bias, gate, NULL,
                                             p->d_memory ? p->d_memory + (long)b * p->T + i * BLOCK : NULL, d_F);
                            multiply(rows, BLOCK, D, d_out, D, 1, p->vt + packed, BLOCK, d_l, BLOCK);
                            gradient_tile(rows, l, d_l, bias, p->lse + from, p->delta + from, d_F);
                            multiply_add(columns, D, rows, l, 1, BLOCK, d_out, D, d_v_head, D);
                        }
                        if (n == 0) continue;
                        if (n == H)
                            for (int m = 0; m < SPAN; m++) {
                                vec sum = load(later + m * LANES);
                                for (int r = rows - 1; r >= 0; r--) {
                                    long at = r * BLOCK + m * LANES;
                                    store(d_l + at, load(d_l + at) + load(gate + at) * sum);
                                    sum += load(d_F + at);
                                }
                                store(later + m * LANES, sum);
                            }
                        multiply_add(columns, D, rows, d_l, 1, BLOCK, q, D, d_k_head, D);
                        multiply_add(rows, D, columns, d_l, BLOCK, 1, p->k + (kv * p->S + j * BLOCK) * D, D, d_q + from * D, D);
                    }
                }
                for (int g = 0; g < p->G; g++)
                    for (long n = 0; n < (long)columns * D; n++) {
                        long at = (((long)b * p->G + g) * p->S + j * BLOCK) * D + n;
                        p->d_k[at] = d_k[(long)g * BLOCK * D + n] * p->scaling;
                        p->d_v[at] = d_v[(long)g * BLOCK * D + n];
                    }
            }
        }
        free(selector);
    }
    if (failed) return failed;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (long head = 0; head < (long)p->B * H; head++)
        for (long n = head * p->T * D; n < (head + 1) * p->T * D; n++) {
            float sum = p->d_q_parts[n];
            for (int part = 1; part < p->parts; part++) sum += p->d_q_parts[part * size + n];
            p->d_q[n] = sum * p->scaling;
        }
    return 0;
}

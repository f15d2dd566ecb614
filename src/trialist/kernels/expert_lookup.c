/* Products of gathered rows, and the k best sums of two score lists, float32.
 *
 * Letters as in expert_lookup.py: N tokens, J rows a token, d width, M = N J entries. Rows lie in one table per
 * generation; `starts` holds the first id of each and, last, their total. Tables are float32 or bfloat16, all else is
 * contiguous float32 and int64.
 *
 * Every output element is summed by one thread in an order that depends on the shapes and ids alone: results are bitwise
 * equal for any number of threads. A row is fetched while the rows before it are multiplied: rows of a large table are
 * in no cache, and no hardware guesses the next id.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define TOGETHER 4 /* rows multiplied at once */
enum { DONE, NO_MEMORY, BAD_ID, NOT_A_NUMBER };

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

typedef struct {
    const void *const *tables;
    const int64_t *starts, *ids;
    const float *x, *weights;
    float *out;
    long N, J, d;
    int generations, half, threads;
} Lookup;

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec x) { *(loose *)p = x; }

INLINE float total(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = x[0];
    for (int n = 1; n < LANES; n++) sum += x[n];
    return sum;
#endif
}

/* Entry i of a row, and LANES of them; bfloat16 is the upper half of float32. */
INLINE vec entries(const void *row, long i, const int half) {
    if (!half) return load((const float *)row + i);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)row + i), uvec) << 16);
}

INLINE float entry(const void *row, long i, const int half) {
    if (!half) return ((const float *)row)[i];
    union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)row)[i] << 16};
    return wide.value;
}

/* The row with this id, on its way into the cache; NULL where there is none. */
INLINE const void *row_of(const Lookup *p, int64_t id, const int half) {
    int g = p->generations - 1;
    if (id < 0 || id >= p->starts[p->generations]) return NULL;
    while (id < p->starts[g]) g--;
    long bytes = p->d * (half ? 2 : 4);
    const char *row = (const char *)p->tables[g] + (id - p->starts[g]) * bytes;
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    return row;
}

INLINE int rows_of(const Lookup *p, const int64_t *ids, long count, const void **rows, const int half) {
    for (long j = 0; j < TOGETHER; j++) {
        rows[j] = row_of(p, ids[j < count ? j : 0], half);
        if (!rows[j]) return 1;
    }
    return 0;
}

/* out[n, j] = row(ids[n, j]) . x[n] */
INLINE int dot_token(const Lookup *p, long n, const int half) {
    const float *x = p->x + n * p->d;
    const int64_t *ids = p->ids + n * p->J;
    const void *rows[TOGETHER], *next[TOGETHER];
    long whole = p->d - p->d % LANES;
    if (p->J && rows_of(p, ids, p->J, next, half)) return 1;
    for (long j = 0; j < p->J; j += TOGETHER) {
        memcpy(rows, next, sizeof rows);
        if (j + TOGETHER < p->J && rows_of(p, ids + j + TOGETHER, p->J - j - TOGETHER, next, half)) return 1;
        vec sums[TOGETHER] = {{0}};
        for (long i = 0; i < whole; i += LANES) {
            vec at = load(x + i);
            for (int r = 0; r < TOGETHER; r++) sums[r] += at * entries(rows[r], i, half);
        }
        for (int r = 0; r < TOGETHER && j + r < p->J; r++) {
            float sum = total(sums[r]);
            for (long i = whole; i < p->d; i++) sum += x[i] * entry(rows[r], i, half);
            p->out[n * p->J + j + r] = sum;
        }
    }
    return 0;
}

/* out[n] = sum over j of weights[n, j] row(ids[n, j]) */
INLINE int sum_token(const Lookup *p, long n, const int half) {
    float *out = p->out + n * p->d;
    const int64_t *ids = p->ids + n * p->J;
    const void *rows[TOGETHER], *next[TOGETHER];
    long whole = p->d - p->d % LANES;
    memset(out, 0, sizeof(float) * p->d);
    if (p->J && rows_of(p, ids, p->J, next, half)) return 1;
    for (long j = 0; j < p->J; j += TOGETHER) {
        float w[TOGETHER];
        memcpy(rows, next, sizeof rows);
        if (j + TOGETHER < p->J && rows_of(p, ids + j + TOGETHER, p->J - j - TOGETHER, next, half)) return 1;
        long count = p->J - j < TOGETHER ? p->J - j : TOGETHER;
        for (long r = 0; r < count; r++) w[r] = p->weights[n * p->J + j + r];
        if (count == TOGETHER) {
            for (long i = 0; i < whole; i += LANES) {
                vec sum = load(out + i);
                for (int r = 0; r < TOGETHER; r++) sum += w[r] * entries(rows[r], i, half);
                store(out + i, sum);
            }
        } else {
            for (long i = 0; i < whole; i += LANES) {
                vec sum = load(out + i);
                for (long r = 0; r < count; r++) sum += w[r] * entries(rows[r], i, half);
                store(out + i, sum);
            }
        }
        for (long i = whole; i < p->d; i++)
            for (long r = 0; r < count; r++) out[i] += w[r] * entry(rows[r], i, half);
    }
    return 0;
}

#define OVER_TOKENS(function)                                                                                          \
    int failed = 0;                                                                                                    \
    _Pragma("omp parallel for num_threads(p->threads) schedule(static) reduction(| : failed)")                         \
    for (long n = 0; n < p->N; n++) failed |= p->half ? function(p, n, 1) : function(p, n, 0);                         \
    return failed ? BAD_ID : DONE;

int gather_dot(const Lookup *p) { OVER_TOKENS(dot_token) }
int gather_sum(const Lookup *p) { OVER_TOKENS(sum_token) }

/* Entries in the order of their ids, those of one id in their own order: `order` (M); the ids that occur, ascending:
 * `rows`, and where their entries begin and, last, end: `offsets`. Returns how many occur, or minus an error. */
long group_by_id(const int64_t *ids, long M, long size, int64_t *order, int64_t *rows, int64_t *offsets) {
    int64_t *next = calloc(size + 1, sizeof(int64_t));
    long found = 0, at = 0;
    if (!next) return -NO_MEMORY;
    for (long e = 0; e < M; e++) {
        if (ids[e] < 0 || ids[e] >= size) {
            free(next);
            return -BAD_ID;
        }
        next[ids[e]]++;
    }
    for (long id = 0; id < size; id++) {
        long count = next[id];
        if (!count) continue;
        rows[found] = id;
        offsets[found++] = next[id] = at;
        at += count;
    }
    offsets[found] = M;
    for (long e = 0; e < M; e++) order[next[ids[e]]++] = e;
    free(next);
    return found;
}

INLINE void add_rows(const int count, const int first, long d, const float *const *rows, const float *w, float *out) {
    long whole = d - d % LANES;
    for (long i = 0; i < whole; i += LANES) {
        vec sum = first ? (vec){0} : load(out + i);
        for (int r = 0; r < count; r++) sum += w[r] * load(rows[r] + i);
        store(out + i, sum);
    }
    for (long i = whole; i < d; i++) {
        float sum = first ? 0.0f : out[i];
        for (int r = 0; r < count; r++) sum += w[r] * rows[r][i];
        out[i] = sum;
    }
}

/* out[places[g]] = sum over the entries e of group g of weights[e] x[e / J] */
void scatter_sum(const float *weights, const float *x, const int64_t *order, const int64_t *offsets,
                 const int64_t *places, long groups, long J, long d, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (long g = 0; g < groups; g++) {
        float *to = out + (places ? places[g] : g) * d;
        for (long at = offsets[g]; at < offsets[g + 1];) {
            const float *rows[TOGETHER];
            float w[TOGETHER];
            long left = offsets[g + 1] - at, count = left < TOGETHER ? left : TOGETHER;
            int first = at == offsets[g];
            for (long r = 0; r < count; r++) {
                long e = order[at + r];
                rows[r] = x + e / J * d;
                w[r] = weights[e];
            }
            if (count == TOGETHER) add_rows(TOGETHER, first, d, rows, w, to);
            else if (count == 3) add_rows(3, first, d, rows, w, to);
            else if (count == 2) add_rows(2, first, d, rows, w, to);
            else add_rows(1, first, d, rows, w, to);
            at += count;
        }
    }
}

typedef struct {
    float score;
    int32_t first, second;
} Pair;

/* Keeps `best[0..k)` sorted, larger scores first and of equal ones the earlier. */
INLINE void insert(Pair *best, int k, int *filled, Pair pair) {
    if (*filled == k && !(pair.score > best[k - 1].score)) return;
    int at = *filled < k ? (*filled)++ : k - 1;
    while (at > 0 && pair.score > best[at - 1].score) {
        best[at] = best[at - 1];
        at--;
    }
    best[at] = pair;
}

INLINE long count_from(const float *s, long n, float level) {
    long whole = n - n % LANES, count = 0;
#if defined(__AVX512F__)
    for (long i = 0; i < whole; i += LANES)
        count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), _mm512_set1_ps(level), _CMP_GE_OQ));
#else
    ivec counts = {0};
    for (long i = 0; i < whole; i += LANES) counts -= load(s + i) >= level - (vec){0};
    for (int l = 0; l < LANES; l++) count += counts[l];
#endif
    for (long i = whole; i < n; i++) count += s[i] >= level;
    return count;
}

/* The k best of n scores, in order. A level that between k and 2 k scores reach is guessed from mean, spread and the last
 * row's `height`, then bisected; only those scores are sorted. */
static int best_of(const float *s, long n, int k, Pair *best, float *height) {
    vec sums = {0}, squares = {0};
    long whole = n - n % LANES;
    float sum = 0, square = 0;
    for (long i = 0; i < whole; i += LANES) {
        vec at = load(s + i);
        sums += at;
        squares += at * at;
    }
    for (long i = whole; i < n; i++) sum += s[i], square += s[i] * s[i];
    float mean = (sum + total(sums)) / n, variance = (square + total(squares)) / n - mean * mean;
    if (mean != mean || variance != variance || mean * 0 != 0) /* also for infinities, which have no mean */
        for (long i = 0; i < n; i++)
            if (s[i] != s[i]) return NOT_A_NUMBER;
    float spread = variance > 0 ? sqrtf(variance) : 0, level = mean + *height * spread, low = -INFINITY, high = INFINITY;
    float step = 0.5f * spread;
    int level_found = 0;
    if (n > 2 * k && spread > 0 && spread * 0 == 0)
        for (int tries = 0; tries < 24 && !level_found; tries++) {
            long count = count_from(s, n, level);
            if (count >= k && count <= 2 * k) level_found = 1;
            else if (count < k) high = level;
            else low = level;
            if (level_found) *height = (level - mean) / spread;
            else if (low > -INFINITY && high < INFINITY) level = 0.5f * (low + high);
            else level += low > -INFINITY ? step : -step, step *= 2;
        }
    int filled = 0;
    if (!level_found) level = -INFINITY;
#if defined(__AVX512F__)
    for (long i = 0; i < whole; i += LANES) {
        unsigned reached = _mm512_cmp_ps_mask(_mm512_loadu_ps(s + i), _mm512_set1_ps(level), _CMP_GE_OQ);
        for (; reached; reached &= reached - 1) {
            long at = i + __builtin_ctz(reached);
            insert(best, k, &filled, (Pair){s[at], (int32_t)at, 0});
        }
    }
#else
    whole = 0;
#endif
    for (long i = whole; i < n; i++)
        if (s[i] >= level) insert(best, k, &filled, (Pair){s[i], (int32_t)i, 0});
    return DONE;
}

/* pairs (R, k, 2): of the n x n sums first[a] + second[b] the k largest, largest first. Of the sorted halves, ranks i and j
 * (from 0) can belong to them only where (i + 1)(j + 1) <= k: that many sums are at least as large as theirs. */
int product_top_k(const float *first, const float *second, long R, long n, long k, int64_t *pairs, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int half = k < n ? k : n, filled;
        Pair *best = malloc(sizeof(Pair) * (2 * half + k));
        Pair *other = best + half, *sums = other + half;
        float heights[2] = {2.0f, 2.0f};
#pragma omp for schedule(static)
        for (long r = 0; r < R; r++) {
            if (!best || failed) {
                failed = best ? failed : NO_MEMORY;
                continue;
            }
            int bad = best_of(first + r * n, n, half, best, heights) | best_of(second + r * n, n, half, other, heights + 1);
            if (bad) {
                failed = bad;
                continue;
            }
            filled = 0;
            for (int i = 0; i < half; i++)
                for (int j = 0; j < half && (long)(i + 1) * (j + 1) <= k; j++) {
                    float score = best[i].score + other[j].score;
                    if (filled == k && !(score > sums[k - 1].score)) break; /* nor does any later j reach the k best */
                    insert(sums, k, &filled, (Pair){score, best[i].first, other[j].first});
                }
            for (long m = 0; m < k; m++) {
                pairs[(r * k + m) * 2] = sums[m].first;
                pairs[(r * k + m) * 2 + 1] = sums[m].second;
            }
        }
        free(best);
    }
    return failed;
}

/* Evicts tokens step by step under a budget, for rows that evict independently of each other.
 *
 * Letters as in eviction.py: N rows, H heads of a row, T queries, S columns; the query of step t stands in column
 * first + t. A row keeps the list of its living columns in ascending order, so a step costs the budget and not S.
 * Rows are spread over threads; each is computed by one thread in one order, so results do not depend on their number.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const float *increments; /* (N, T, S), NULL is zero: what each query adds to the scores; the highest score goes */
    const float *logits;     /* (N, H, T, S) or NULL: attention adds the weights over living columns; the lowest goes */
    float *scores;           /* (N, S), in and out */
    uint8_t *alive;          /* (N, S), in and out */
    const uint8_t *visible;  /* strides visible_n, visible_t, 1; NULL is causal */
    const uint8_t *protect;  /* (N, S) */
    uint8_t *seen;           /* (N, T, S), out, zeroed */
    long visible_n, visible_t;
    int N, H, T, S, first, budget, recent, threads;
} Problem;

/* The columns that query t sees: living ones before it and its own. Returns their number, 0 for padding. */
static int look(const Problem *p, long n, int t, int *living, int *count, int *looks) {
    int own = p->first + t, seen = 0;
    const uint8_t *visible = p->visible ? p->visible + n * p->visible_n + t * p->visible_t : NULL;
    if (visible && !visible[own]) return 0;
    living[(*count)++] = own;
    for (int i = 0; i < *count; i++)
        if (!visible || visible[living[i]]) looks[seen++] = living[i];
    return seen;
}

static void score(const Problem *p, long n, int t, const int *looks, int seen, float *scores, float *weights) {
    if (p->increments) {
        const float *row = p->increments + (n * p->T + t) * p->S;
        for (int i = 0; i < seen; i++) scores[looks[i]] += row[looks[i]];
    }
    for (int h = 0; p->logits && h < p->H; h++) {
        const float *row = p->logits + ((n * p->H + h) * p->T + t) * p->S;
        float highest = -INFINITY, sum = 0.0f;
        for (int i = 0; i < seen; i++) highest = fmaxf(highest, row[looks[i]]);
        for (int i = 0; i < seen; i++) sum += weights[i] = expf(row[looks[i]] - highest);
        for (int i = 0; i < seen; i++) scores[looks[i]] += weights[i] / sum;
    }
}

/* The column that goes next: among equals the oldest; -1 where all are protected. */
static int choose(const Problem *p, const int *looks, int seen, const float *scores, const uint8_t *protect) {
    int chosen = -1;
    for (int i = 0; i < seen - p->recent; i++) {
        int j = looks[i];
        if (protect[j]) continue;
        if (chosen < 0 || (p->logits ? scores[j] < scores[chosen] : scores[j] > scores[chosen])) chosen = j;
    }
    return chosen;
}

static int without(int *list, int count, int column) {
    int kept = 0;
    for (int i = 0; i < count; i++)
        if (list[i] != column) list[kept++] = list[i];
    return kept;
}

int evict(const Problem *p) {
    int failed = 0;
#pragma omp parallel num_threads(p->threads)
    {
        int *living = malloc(sizeof(int) * 2 * p->S);
        float *weights = malloc(sizeof(float) * p->S);
#pragma omp for schedule(dynamic, 1)
        for (long n = 0; n < p->N; n++) {
            if (!living || !weights) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            int count = 0, *looks = living + p->S;
            uint8_t *alive = p->alive + n * p->S;
            float *scores = p->scores + n * p->S;
            for (int j = 0; j < p->first; j++)
                if (alive[j]) living[count++] = j;
            for (int t = 0; t < p->T; t++) {
                int seen = look(p, n, t, living, &count, looks);
                uint8_t *row = p->seen + (n * p->T + t) * p->S;
                for (int i = 0; i < seen; i++) row[looks[i]] = 1;
                score(p, n, t, looks, seen, scores, weights);
                while (seen > p->budget) {
                    int gone = choose(p, looks, seen, scores, p->protect + n * p->S);
                    if (gone < 0) break;
                    count = without(living, count, gone);
                    seen = without(looks, seen, gone);
                }
            }
            memset(alive, 0, p->S);
            for (int i = 0; i < count; i++) alive[living[i]] = 1;
        }
        free(living);
        free(weights);
    }
    return failed;
}

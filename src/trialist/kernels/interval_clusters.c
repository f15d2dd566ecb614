/* The best cut of each sorted row into C intervals: the greatest sum of S1^2 / S0 over them, S0 and S1 sums of two series.
 *
 * D[c][j] = max over i <= j of D[c - 1][i] + gain(i, j). The first best i grows with j, so that the middle place bounds the
 * search at the places on both of its sides: K log K gains for each c. One thread works on a row; ties go to the first i.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const double *s0, *s1; /* (R, K + 1) prefix sums */
    int64_t *borders;      /* (R, C + 1), out */
    long R, K;
    int C, threads;
} Problem;

typedef struct {
    const double *s0, *s1, *before;
    double *best;
    int32_t *chosen;
} Layer;

static inline double reached(const Layer *l, long i, long j) {
    double weight = l->s0[j] - l->s0[i], sum = l->s1[j] - l->s1[i];
    return l->before[i] + (weight > 0 ? sum * sum / weight : 0.0);
}

static void place(const Layer *l, long j, long low, long high) {
    long first = low;
    double best = reached(l, low, j);
    for (long i = low + 1; i <= high; i++) {
        double value = reached(l, i, j);
        if (value > best) best = value, first = i;
    }
    l->best[j] = best;
    l->chosen[j] = (int32_t)first;
}

static void places(const Layer *l, long from, long to, long low, long high) {
    if (from > to) return;
    long middle = (from + to) / 2;
    place(l, middle, low, high < middle ? high : middle);
    places(l, from, middle - 1, low, l->chosen[middle]);
    places(l, middle + 1, to, l->chosen[middle], high);
}

/* Returns 0, or 1 where there is no memory. */
int cut_rows(const Problem *p) {
    int failed = 0;
    long size = p->K + 1;
#pragma omp parallel num_threads(p->threads) if (p->R > 1)
    {
        double *best = malloc(sizeof(double) * 2 * size);
        int32_t *chosen = malloc(sizeof(int32_t) * p->C * size);
#pragma omp for schedule(dynamic, 4)
        for (long r = 0; r < p->R; r++) {
            if (!best || !chosen) {
#pragma omp atomic write
                failed = 1;
                continue;
            }
            Layer l = {p->s0 + r * size, p->s1 + r * size, best, best + size, chosen};
            int64_t *x = p->borders + r * (p->C + 1);
            for (long j = 0; j < size; j++) {
                double weight = l.s0[j] - l.s0[0], sum = l.s1[j] - l.s1[0];
                best[j] = weight > 0 ? sum * sum / weight : 0.0;
            }
            for (int c = 2; c <= p->C; c++) {
                l.chosen = chosen + (c - 1) * size;
                if (c == p->C) place(&l, p->K, 0, p->K);
                else places(&l, 0, p->K, 0, p->K);
                double *last = (double *)l.before;
                l.before = l.best, l.best = last;
            }
            x[0] = 0, x[p->C] = p->K;
            for (int c = p->C; c > 1; c--) x[c - 1] = chosen[(c - 1) * size + x[c]];
        }
        free(best);
        free(chosen);
    }
    return failed;
}

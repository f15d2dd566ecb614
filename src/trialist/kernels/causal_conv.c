/* Causal convolution of each channel by itself, forward and backward, float32:  y[t] = sum over n of w[n] x[t-n]
 *
 * x, y and their gradients are (B, T, D), w is (K, D), all contiguous. reach (B, T) says how many taps back a step may
 * look beside itself; NULL is as far as the row goes. The gradient of w is summed per batch row, (B, K, D).
 *
 * A task is one batch row and SPAN channels: the K steps that it touches at a time stay in the first-level cache. Each
 * output is computed by one thread in a fixed order: results are bitwise equal for any number of threads.
 */
#include <stdint.h>

#define SPAN 128
#define WORTH 32768 /* numbers from which on further threads pay for their start */

typedef struct {
    const float *x, *w, *grad;
    float *y, *d_x, *d_w;
    const uint8_t *reach;
    int B, T, D, K, threads;
} problem;

static int taps(const problem *p, int row, long t) {
    int n = p->reach ? p->reach[(long)row * p->T + t] : p->K - 1;
    return (n < t ? n : (int)t) + 1;
}

static void forward(const problem *p, int row, int first, int width) {
    for (long t = 0; t < p->T; t++) {
        long at = ((long)row * p->T + t) * p->D + first;
        float sum[SPAN] = {0};
        for (int n = 0, last = taps(p, row, t); n < last; n++) {
            const float *w = p->w + (long)n * p->D + first, *x = p->x + at - (long)n * p->D;
            for (int c = 0; c < width; c++) sum[c] += w[c] * x[c];
        }
        for (int c = 0; c < width; c++) p->y[at + c] = sum[c];
    }
}

static void backward(const problem *p, int row, int first, int width) {
    for (long n = 0; n < p->K; n++)
        for (int c = 0; c < width; c++) p->d_w[((long)row * p->K + n) * p->D + first + c] = 0.0f;
    for (long t = 0; t < p->T; t++) {
        long at = ((long)row * p->T + t) * p->D + first;
        const float *grad = p->grad + at;
        for (int c = 0; c < width; c++) p->d_x[at + c] = 0.0f;
        for (int n = 0, last = taps(p, row, t); n < last; n++) {
            const float *w = p->w + (long)n * p->D + first, *x = p->x + at - (long)n * p->D;
            float *d_x = p->d_x + at - (long)n * p->D, *d_w = p->d_w + ((long)row * p->K + n) * p->D + first;
            for (int c = 0; c < width; c++) {
                d_x[c] += w[c] * grad[c];
                d_w[c] += x[c] * grad[c];
            }
        }
    }
}

static void run(const problem *p, void (*task)(const problem *, int, int, int)) {
    int spans = (p->D + SPAN - 1) / SPAN;
    int worth = (long)p->B * p->T * p->D >= WORTH;
#pragma omp parallel for num_threads(p->threads) schedule(static) if (worth)
    for (long i = 0; i < (long)p->B * spans; i++) {
        int first = (int)(i % spans) * SPAN;
        task(p, (int)(i / spans), first, p->D - first < SPAN ? p->D - first : SPAN);
    }
}

void convolution_forward(const problem *p) { run(p, forward); }
void convolution_backward(const problem *p) { run(p, backward); }

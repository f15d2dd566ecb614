/* Linear recurrences over (B, T, D), forward and backward, float32.
 *
 *     scan:    h[t] = a[t] h[t-1] + b[t]
 *     gated:   h[t] = (1 - z) h[t-1] + z g(c[t])    with z = sigmoid(k[t]); marks say which steps are padding or restarts
 *
 * The channels D of a step lie next to each other. `x.row` and `x.step` are the strides, in numbers, between batch rows
 * and between steps; a negative step, with the pointer at the last one, runs time backwards.
 *
 * A task is one batch row and SPAN channels, whose carry stays in the first-level cache: every number is read or written
 * once. Each output is computed by one thread in an order that depends on nothing else: results are bitwise equal for any
 * number of threads.
 */
#include <stdint.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define SPAN 128
#define WORTH 32768 /* numbers from which on further threads pay for their start; decoding a token stays below */
#define INLINE static inline __attribute__((always_inline))

enum { TOKEN, PADDING, RESTART };

typedef struct {
    float *at;
    long row, step;
} series;

typedef struct {
    series a, b, f, h, grad, d_a, d_b, d_f; /* a, b are k, c of the gated recurrence; h is written forward, read backward */
    const float *h0;
    float *d_h0;
    const uint8_t *marks; /* (B, T), or NULL where every step is a token */
    int B, T, D, positive, threads; /* positive: g(c) = c + 1/2 where c >= 0, sigmoid(c) below; else g(c) = c */
} problem;

INLINE float *place(const series *x, int row, long t, int channel) {
    return x->at + row * x->row + t * x->step + channel;
}

INLINE const float *initial(const problem *p, int row, int first) {
    return p->h0 ? p->h0 + (long)row * p->D + first : 0;
}

/* States and gradients fade by a factor at every step. What has faded below 1e-38 is nothing, but without this the
 * processor would compute it ten times slower than a number. */
static unsigned flush_denormals(void) {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static void restore(unsigned before) {
#if defined(__SSE__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* e^x for x <= 0, relative error below 2e-7; 1e-38 below -87. In operations that the compiler turns into vectors. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23 rounds to an integer kept in the low bits */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float f; int32_t i; } scale = {.f = shifted};
    scale.i = (scale.i + 127) << 23;
    return p * scale.f;
}

/* sigmoid(x) and 1 - sigmoid(x), both to full relative precision */
INLINE void logistic(float x, float *up, float *down) {
    float e = exponential(x < 0.0f ? x : -x);
    float large = 1.0f / (1.0f + e), small = e * large;
    *up = x < 0.0f ? small : large;
    *down = x < 0.0f ? large : small;
}

/* One gate: z = sigmoid(k). Two: z = sigmoid(k) / (sigmoid(f) + sigmoid(k)) = A / (A + B) with A = 1 + e^-f, B = 1 + e^-k, all
 * times e^-s so that nothing overflows. z and 1 - z come to full relative precision. The log-odds of z are log A - log B;
 * their slopes are by_k = sigmoid(-k) and by_f = -sigmoid(-f). */
INLINE void gates(float k, const float *f, float *z, float *keep, float *by_k, float *by_f) {
    if (!f) {
        logistic(k, z, keep);
        *by_k = 1.0f;
        *by_f = 0.0f;
        return;
    }
    float s = k < *f ? -k : -*f;
    s = s < 0.0f ? 0.0f : s;
    float one = exponential(-s), e_k = exponential(-k - s), e_f = exponential(-*f - s);
    float a = one + e_f, b = one + e_k, scale = 1.0f / (a + b);
    *z = a * scale;
    *keep = b * scale;
    *by_k = e_k / b;
    *by_f = -e_f / a;
}

INLINE float candidate(float c, int positive, float *slope) {
    float up, down;
    logistic(c, &up, &down);
    *slope = positive && c < 0.0f ? up * down : 1.0f;
    return !positive ? c : c < 0.0f ? up : c + 0.5f;
}

static void scan_steps(const problem *p, int row, int first, int width) {
    const float *h0 = initial(p, row, first);
    float carry[SPAN];
    for (int n = 0; n < width; n++) carry[n] = h0 ? h0[n] : 0.0f;
    for (long t = 0; t < p->T; t++) {
        const float *a = place(&p->a, row, t, first), *b = place(&p->b, row, t, first);
        float *h = place(&p->h, row, t, first);
        for (int n = 0; n < width; n++) h[n] = carry[n] = a[n] * carry[n] + b[n];
    }
}

/* d_b[t] = grad[t] + a[t+1] d_b[t+1],  d_a[t] = d_b[t] h[t-1],  d_h0 = a[0] d_b[0] */
static void scan_steps_back(const problem *p, int row, int first, int width) {
    float carry[SPAN] = {0}; /* a[t+1] d_b[t+1] */
    for (long t = p->T - 1; t >= 0; t--) {
        const float *a = place(&p->a, row, t, first), *grad = place(&p->grad, row, t, first);
        const float *last = t ? place(&p->h, row, t - 1, first) : initial(p, row, first);
        float *d_a = place(&p->d_a, row, t, first), *d_b = place(&p->d_b, row, t, first);
        for (int n = 0; n < width; n++) {
            float d = grad[n] + carry[n];
            carry[n] = a[n] * d;
            d_b[n] = d;
            d_a[n] = last ? d * last[n] : 0.0f;
        }
    }
    if (p->d_h0)
        for (int n = 0; n < width; n++) p->d_h0[(long)row * p->D + first + n] = carry[n];
}

INLINE void gated(const problem *p, int row, int first, int width, int positive, int two) {
    const float *h0 = initial(p, row, first);
    float carry[SPAN], slope, by_k, by_f;
    for (int n = 0; n < width; n++) carry[n] = h0 ? h0[n] : 0.0f;
    for (long t = 0; t < p->T; t++) {
        int mark = p->marks ? p->marks[(long)row * p->T + t] : TOKEN;
        const float *k = place(&p->a, row, t, first), *c = place(&p->b, row, t, first);
        const float *f = two ? place(&p->f, row, t, first) : 0;
        float *h = place(&p->h, row, t, first);
        if (mark == RESTART)
            for (int n = 0; n < width; n++) carry[n] = 0.0f;
        if (mark != PADDING)
            for (int n = 0; n < width; n++) {
                float z, keep;
                gates(k[n], two ? f + n : 0, &z, &keep, &by_k, &by_f);
                carry[n] = keep * carry[n] + z * candidate(c[n], positive, &slope);
            }
        for (int n = 0; n < width; n++) h[n] = carry[n];
    }
}

/* With d[t] = grad[t] + keep[t+1] d[t+1]:  d_u = d (g(c) - h[t-1]) z keep for the log-odds u of z,  d_c = d z g'(c) */
INLINE void gated_back(const problem *p, int row, int first, int width, int positive, int two) {
    static const float nothing[SPAN];
    float carry[SPAN] = {0};
    for (long t = p->T - 1; t >= 0; t--) {
        int mark = p->marks ? p->marks[(long)row * p->T + t] : TOKEN;
        const float *k = place(&p->a, row, t, first), *c = place(&p->b, row, t, first);
        const float *f = two ? place(&p->f, row, t, first) : 0, *grad = place(&p->grad, row, t, first);
        const float *last = t ? place(&p->h, row, t - 1, first) : initial(p, row, first);
        float *d_k = place(&p->d_a, row, t, first), *d_c = place(&p->d_b, row, t, first);
        float *d_f = two ? place(&p->d_f, row, t, first) : 0;
        if (mark == PADDING) {
            for (int n = 0; n < width; n++) carry[n] += grad[n];
            for (int n = 0; n < width; n++) d_k[n] = d_c[n] = 0.0f;
            for (int n = 0; two && n < width; n++) d_f[n] = 0.0f;
            continue;
        }
        if (!last || mark == RESTART) last = nothing;
#pragma GCC ivdep /* too many pairs of pointers to be checked at run time */
        for (int n = 0; n < width; n++) {
            float z, keep, by_k, by_f, slope, d = grad[n] + carry[n];
            gates(k[n], two ? f + n : 0, &z, &keep, &by_k, &by_f);
            float new = candidate(c[n], positive, &slope), d_u = d * (new - last[n]) * z * keep;
            d_k[n] = d_u * by_k;
            if (two) d_f[n] = d_u * by_f;
            d_c[n] = d * z * slope;
            carry[n] = mark == RESTART ? 0.0f : keep * d;
        }
    }
    if (p->d_h0)
        for (int n = 0; n < width; n++) p->d_h0[(long)row * p->D + first + n] = carry[n];
}

static void gated_steps(const problem *p, int row, int first, int width) {
    if (p->f.at) p->positive ? gated(p, row, first, width, 1, 1) : gated(p, row, first, width, 0, 1);
    else p->positive ? gated(p, row, first, width, 1, 0) : gated(p, row, first, width, 0, 0);
}

static void gated_steps_back(const problem *p, int row, int first, int width) {
    if (p->f.at) p->positive ? gated_back(p, row, first, width, 1, 1) : gated_back(p, row, first, width, 0, 1);
    else p->positive ? gated_back(p, row, first, width, 1, 0) : gated_back(p, row, first, width, 0, 0);
}

static void run(const problem *p, void (*task)(const problem *, int, int, int)) {
    int spans = (p->D + SPAN - 1) / SPAN;
    int worth = (long)p->B * p->T * p->D >= WORTH;
#pragma omp parallel num_threads(p->threads) if (worth)
    {
        unsigned before = flush_denormals();
#pragma omp for schedule(static)
        for (long i = 0; i < (long)p->B * spans; i++) {
            int first = (int)(i % spans) * SPAN;
            task(p, (int)(i / spans), first, p->D - first < SPAN ? p->D - first : SPAN);
        }
        restore(before);
    }
}

void scan_forward(const problem *p) { run(p, scan_steps); }
void scan_backward(const problem *p) { run(p, scan_steps_back); }
void gated_forward(const problem *p) { run(p, gated_steps); }
void gated_backward(const problem *p) { run(p, gated_steps_back); }

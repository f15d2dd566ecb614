/* Products of activations with weights that are stored as bit-planes and a table of values a row.
 *
 *     y[m, r] = sum over k of table[r, code(r, k)] x[m, k] + bias[r],    code(r, k) = the k-th bits of planes 0 .. bits - 1
 *
 * planes (P, N, W): plane 0 holds the first, highest bit of every code; bit k % 64 of word k / 64 belongs to weight k. The
 * first `bits` planes are read, whatever P is. table (N, 2^bits): float16, or bfloat16.
 *
 * A vector of 512 bits of each plane holds 512 weights, 32 neighbours in a lane of 32 bits. A butterfly of shifts and selects
 * transposes 4 planes, so that every nibble is a code and a permutation, which reads the low bits of a lane alone, looks 16
 * up: a permutation, a shift and a multiplication for 16 weights. x is brought into that order once a call. Beyond 4 bits the
 * transposed fields are bytes, and the tables of two bytes are looked up 64 at once. What is left of a row, less than one
 * vector, is looked up by masks, in order.
 *
 * Each output is computed by one thread in an order that depends on the shapes alone: results are bitwise equal for any number
 * of threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST 8 /* rows of x that are multiplied while a weight is in a register */
#define WORTH 65536 /* weights from which on further threads pay for their start */
enum { SCALAR, AVX2, AVX512, AVX512_BF16, AVX512_BF16_EMULATED };
enum { NATURAL, NIBBLES_8_LANES, NIBBLES_16, NIBBLES_32, BYTES_16, BYTES_32, SPLIT_16, SPLIT_HALF, SPLIT_BRAIN };

typedef struct {
    const uint64_t *planes;
    const uint16_t *table;
    const float *x, *bias; /* (M, K), and (N) or NULL */
    float *y;              /* (M, N) */
    long P, N, K, W;
    int M, bits, brain, isa, threads; /* brain: the table is bfloat16 */
} Product;

typedef struct {
    const uint64_t *planes;
    const uint16_t *table;
    void *out; /* (last - first, K): float32, or bfloat16 */
    long P, N, K, W, first, last;
    int bits, brain, isa, threads, brain_out;
} Dequantization;

static float from_brain(uint16_t bits) {
    union { uint32_t bits; float value; } wide = {(uint32_t)bits << 16};
    return wide.value;
}

static uint16_t to_brain(float value) { /* to the nearest, ties to even; weights and activations here are finite */
    union { float value; uint32_t bits; } wide = {value};
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    union { uint32_t bits; float value; } wide;
    if (exponent == 0) {
        wide.value = (float)fraction * 0x1p-24f;
        wide.bits |= sign;
    } else
        wide.bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    return wide.value;
}

static void row_of_table(const uint16_t *table, int bits, int brain, float *out) {
    for (int c = 0; c < 1 << bits; c++) out[c] = brain ? from_brain(table[c]) : from_half(table[c]);
}

/* Weights of one word of a row, `count` of them. Eight codes at a time lie in the bytes of a word. */
static void decode_word(const uint64_t *word, long plane, int bits, const float *values, int count, float *out) {
    for (int first = 0; first < count; first += 8) {
        uint64_t codes = 0;
        for (int b = 0; b < bits; b++) {
            uint64_t byte = (word[b * plane] >> first) & 255;
            uint64_t apart = (byte * 0x0101010101010101u) & 0x8040201008040201u; /* bit i stays in byte i */
            codes = codes << 1 | (((apart + 0x7f7f7f7f7f7f7f7fu) | apart) >> 7 & 0x0101010101010101u);
        }
        for (int k = first; k < first + 8 && k < count; k++, codes >>= 8) out[k] = values[codes & 255];
    }
}

static int weights_of(long K, long word) { return K - 64 * word < 64 ? (int)(K - 64 * word) : 64; }

static void scalar_words(const Product *p, long r, long from, const float *values, float *sums) {
    const uint64_t *row = p->planes + r * p->W;
    for (long i = from; i < p->W; i++) {
        float w[64];
        int count = weights_of(p->K, i);
        decode_word(row + i, p->N * p->W, p->bits, values, count, w);
        for (int m = 0; m < p->M; m++) {
            const float *x = p->x + m * p->K + 64 * i;
            float parts[8] = {0}; /* in an order that any vector unit can keep */
            int k = 0;
            for (; k + 8 <= count; k += 8)
                for (int i = 0; i < 8; i++) parts[i] += w[k + i] * x[k + i];
            for (; k < count; k++) parts[0] += w[k] * x[k];
            sums[m] += ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
        }
    }
}

static void scalar_row(const Product *p, const void *x, long r) {
    float values[256], sums[MOST] = {0};
    (void)x;
    row_of_table(p->table + (r << p->bits), p->bits, p->brain, values);
    scalar_words(p, r, 0, values, sums);
    for (int m = 0; m < p->M; m++) p->y[m * p->N + r] = sums[m] + (p->bias ? p->bias[r] : 0.0f);
}

/* Where the number at place `at` of an order stands within a block of weights in their own order. */
static int source(int order, int at) {
    int step, lane, j, n;
    switch (order) {
    case NIBBLES_8_LANES:
        step = at / 8, lane = at % 8, j = step % 4, n = step / 4;
        return 32 * lane + 4 * n + j;
    case NIBBLES_32: /* step 4 n + j: nibble n of lanes of 32 bits */
        step = at / 16, lane = at % 16, j = step % 4, n = step / 4;
        return 32 * lane + 4 * n + j;
    case NIBBLES_16:
        step = at / 32, lane = at % 32, j = step % 4, n = step / 4;
        return 16 * lane + 4 * n + j;
    case BYTES_32: /* step 4 j + n: byte n of vector j; the odd nibbles are in the second four vectors */
        step = at / 16, lane = at % 16, j = step / 4, n = step % 4;
        return 32 * lane + 8 * n + j;
    case BYTES_16:
        step = at / 32, lane = at % 32, j = step / 2, n = step % 2;
        return 16 * lane + 8 * n + j;
    default: break;
    }
    /* 64 bytes of vector j, unpacked: element e of half h is byte 16 (e / 8) + 8 h + e % 8 */
    j = at / 64;
    int rest = at % 64, h = rest / 32, e = rest % 32;
    if (order == SPLIT_BRAIN) e = e < 16 ? 2 * e : 2 * (e - 16) + 1; /* the even ones of a half first */
    return 8 * (16 * (e / 8) + 8 * h + e % 8) + j;
}

/* x with the numbers of each whole block in an order, those behind the last block as they are; zeros behind them, and in rows
 * from M on. */
static void reorder(const Product *p, int rows, int order, int block, float *out, uint16_t *brain_out) {
    int places[512];
    long padded = 64 * p->W, whole = p->K / block * block;
    for (int i = 0; i < block; i++) places[i] = source(order, i);
    for (int m = 0; m < rows; m++)
        for (long k = 0; k < padded; k++) {
            long at = k < whole ? k - k % block + places[k % block] : k;
            float value = m < p->M && at < p->K ? p->x[m * p->K + at] : 0.0f;
            if (brain_out) brain_out[m * padded + k] = to_brain(value);
            else out[m * padded + k] = value;
        }
}

#if defined(__x86_64__)
#include <immintrin.h>
#define INLINE static inline __attribute__((always_inline))

/* ---- AVX2: 8 weights at once, up to 4 bits ---- */
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))

WITH_AVX2 INLINE __m256i pick_256(__m256i mask, __m256i yes, __m256i no) {
    return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
}

WITH_AVX2 INLINE void transpose_256(__m256i r0, __m256i r1, __m256i r2, __m256i r3, __m256i *t) {
    __m256i low = _mm256_set1_epi32(0x33333333), even = _mm256_set1_epi32(0x55555555);
    __m256i a0 = pick_256(low, r0, _mm256_slli_epi32(r2, 2)), a2 = pick_256(low, _mm256_srli_epi32(r0, 2), r2);
    __m256i a1 = pick_256(low, r1, _mm256_slli_epi32(r3, 2)), a3 = pick_256(low, _mm256_srli_epi32(r1, 2), r3);
    t[0] = pick_256(even, a0, _mm256_slli_epi32(a1, 1));
    t[1] = pick_256(even, _mm256_srli_epi32(a0, 1), a1);
    t[2] = pick_256(even, a2, _mm256_slli_epi32(a3, 1));
    t[3] = pick_256(even, _mm256_srli_epi32(a2, 1), a3);
}

WITH_AVX2 INLINE void avx2_row(const Product *p, const float *x, long r, const int M) {
    const int bits = p->bits;
    float values[16], sums[MOST] = {0};
    long plane = p->N * p->W, padded = 64 * p->W, blocks = p->K / 256;
    const uint64_t *row = p->planes + r * p->W;
    row_of_table(p->table + (r << bits), bits, p->brain, values);
    for (int c = 1 << bits; c < 16; c++) values[c] = values[c - (1 << bits)];
    __m256 first = _mm256_loadu_ps(values), second = _mm256_loadu_ps(values + 8), acc[MOST];
    for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_ps();
    for (long i = 0; i < blocks; i++) {
        __m256i r0[4], t[4];
        for (int b = 0; b < 4; b++)
            r0[b] = b < bits ? _mm256_loadu_si256((const __m256i *)(row + (bits - 1 - b) * plane + 4 * i))
                             : _mm256_setzero_si256();
        transpose_256(r0[0], r0[1], r0[2], r0[3], t);
        for (int n = 0; n < 8; n++)
            for (int j = 0; j < 4; j++) {
                __m256 w = _mm256_permutevar8x32_ps(first, t[j]);
                if (bits == 4)
                    w = _mm256_blendv_ps(w, _mm256_permutevar8x32_ps(second, t[j]),
                                         _mm256_castsi256_ps(_mm256_slli_epi32(t[j], 28)));
                for (int m = 0; m < M; m++)
                    acc[m] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + m * padded + 256 * i + 8 * (4 * n + j)), acc[m]);
                t[j] = _mm256_srli_epi32(t[j], 4);
            }
    }
    scalar_words(p, r, 4 * blocks, values, sums);
    for (int m = 0; m < M; m++) {
        float parts[8], sum;
        if (m == p->M) break;
        sum = sums[m];
        _mm256_storeu_ps(parts, acc[m]);
        for (int i = 0; i < 8; i++) sum += parts[i];
        p->y[m * p->N + r] = sum + (p->bias ? p->bias[r] : 0.0f);
    }
}

/* ---- AVX-512 with VBMI ---- */
#define WITH_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))
#define PICK(mask, yes, no) _mm512_ternarylogic_epi32(mask, yes, no, 0xCA)

WITH_AVX512 INLINE void transpose_512(const __m512i *r, __m512i *t) {
    __m512i low = _mm512_set1_epi32(0x33333333), even = _mm512_set1_epi32(0x55555555);
    __m512i a0 = PICK(low, r[0], _mm512_slli_epi32(r[2], 2)), a2 = PICK(low, _mm512_srli_epi32(r[0], 2), r[2]);
    __m512i a1 = PICK(low, r[1], _mm512_slli_epi32(r[3], 2)), a3 = PICK(low, _mm512_srli_epi32(r[1], 2), r[3]);
    t[0] = PICK(even, a0, _mm512_slli_epi32(a1, 1));
    t[1] = PICK(even, _mm512_srli_epi32(a0, 1), a1);
    t[2] = PICK(even, a2, _mm512_slli_epi32(a3, 1));
    t[3] = PICK(even, _mm512_srli_epi32(a2, 1), a3);
}

/* Codes of 512 weights: up to 4 bits in the nibbles of t[0 .. 3], beyond in the bytes of t[0 .. 7]. */
WITH_AVX512 INLINE void codes_of_block(const uint64_t *row, long plane, int bits, const int width, __m512i *t) {
    __m512i r[8], high[4], low[4], four = _mm512_set1_epi8(15);
    for (int b = 0; b < (width > 4 ? 8 : 4); b++)
        r[b] = b < bits ? _mm512_loadu_si512(row + (bits - 1 - b) * plane) : _mm512_setzero_si512();
    if (width <= 4) {
        transpose_512(r, t);
        return;
    }
    transpose_512(r, low);
    transpose_512(r + 4, high);
    for (int j = 0; j < 4; j++) {
        t[j] = PICK(four, low[j], _mm512_slli_epi32(high[j], 4));
        t[4 + j] = PICK(four, _mm512_srli_epi32(low[j], 4), high[j]);
    }
}

WITH_AVX512 INLINE __m512i look_up_bytes(const __m512i *table, __m512i codes, const int bits) {
    if (bits == 6) return _mm512_permutexvar_epi8(codes, table[0]);
    __m512i first = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    if (bits == 7) return first;
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), first,
                                  _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

WITH_AVX512 INLINE void split_table(const uint16_t *table, int bits, __m512i *low, __m512i *high) {
    uint8_t bytes[2][256] = {{0}};
    for (int c = 0; c < 1 << bits; c++) bytes[0][c] = (uint8_t)table[c], bytes[1][c] = (uint8_t)(table[c] >> 8);
    for (int i = 0; i < 4; i++)
        low[i] = _mm512_loadu_si512(bytes[0] + 64 * i), high[i] = _mm512_loadu_si512(bytes[1] + 64 * i);
}

/* Codes of 16 neighbours, the q-th 16 bits of a word. */
WITH_AVX512 INLINE __m512i codes_of_quarter(const uint64_t *word, long plane, const int bits, int q) {
    __m512i codes = _mm512_setzero_si512();
    for (int b = 0; b < bits; b++) {
        __mmask16 set = (__mmask16)(word[b * plane] >> 16 * q);
        codes = _mm512_mask_or_epi32(codes, set, codes, _mm512_set1_epi32(1 << (bits - 1 - b)));
    }
    return codes;
}

WITH_AVX512 INLINE __m512 look_up_quarter(__m512i codes, const float *values, const int bits) {
    if (bits <= 4) return _mm512_permutexvar_ps(codes, _mm512_loadu_ps(values));
    if (bits == 5) return _mm512_permutex2var_ps(_mm512_loadu_ps(values), codes, _mm512_loadu_ps(values + 16));
    return _mm512_i32gather_ps(codes, values, 4);
}

/* Sixteen entries of a table as float32; fewer are repeated, as permutations read bits of the next code too. */
WITH_AVX512 INLINE __m512 entries_512(const uint16_t *table, int bits, int brain) {
    uint64_t some = 0;
    __m256i raw;
    if (bits >= 4) raw = _mm256_loadu_si256((const __m256i *)table);
    else if (bits == 3) raw = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    else {
        memcpy(&some, table, bits == 2 ? 8 : 4);
        raw = _mm256_set1_epi64x((long long)(bits == 2 ? some : some << 32 | some));
    }
    return brain ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)) : _mm512_cvtph_ps(raw);
}

WITH_AVX512 INLINE void finish_512(const Product *p, long r, const int M, const int chains, __m512 (*acc)[4]) {
    for (int m = 0; m < M && m < p->M; m++) {
        __m512 sum = acc[m][0];
        for (int c = 1; c < chains; c++) sum = _mm512_add_ps(sum, acc[m][c]);
        p->y[m * p->N + r] = _mm512_reduce_add_ps(sum) + (p->bias ? p->bias[r] : 0.0f);
    }
}

WITH_AVX512 INLINE void avx512_row(const Product *p, const float *x, long r, const int M, const int width, const int brain) {
    const int bits = width > 4 ? width : p->bits; /* up to 4 they share their code */
    const int chains = M == 1 ? 4 : M <= 3 ? 2 : 1; /* sums that wait for nobody */
    float values[256] __attribute__((aligned(64)));
    long plane = p->N * p->W, padded = 64 * p->W, blocks = p->K / 512;
    const uint64_t *row = p->planes + r * p->W;
    const uint16_t *table = p->table + (r << bits);
    for (int c = 0; c < 1 << width; c += 16) _mm512_store_ps(values + c, entries_512(table + c, bits, p->brain));
    __m512 first = _mm512_load_ps(values), second = width == 5 ? _mm512_load_ps(values + 16) : first, acc[MOST][4];
    __m512i low[4], high[4], t[8];
    if (bits > 5) split_table(table, bits, low, high);
    for (int m = 0; m < M; m++)
        for (int c = 0; c < 4; c++) acc[m][c] = _mm512_setzero_ps();
#define TAKE(w, at, c) \
    for (int m = 0; m < M; m++) acc[m][(c) % chains] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + m * padded + (at)), acc[m][(c) % chains])
    for (long i = 0; i < blocks; i++) {
        long start = 512 * i;
        codes_of_block(row + 8 * i, plane, bits, width, t);
        if (width == 4) {
            for (int n = 0; n < 8; n++)
                for (int j = 0; j < 4; j++) {
                    __m512 w = _mm512_permutexvar_ps(t[j], first);
                    TAKE(w, start + 16 * (4 * n + j), j);
                    t[j] = _mm512_srli_epi32(t[j], 4);
                }
        } else if (width == 5) {
            for (int j = 0; j < 8; j++)
                for (int n = 0; n < 4; n++) {
                    __m512 w = _mm512_permutex2var_ps(first, t[j], second);
                    TAKE(w, start + 16 * (4 * j + n), n);
                    t[j] = _mm512_srli_epi32(t[j], 8);
                }
        } else {
            for (int j = 0; j < 8; j++) {
                __m512i lo = look_up_bytes(low, t[j], bits), hi = look_up_bytes(high, t[j], bits);
                for (int h = 0; h < 2; h++) {
                    __m512i pairs = h ? _mm512_unpackhi_epi8(lo, hi) : _mm512_unpacklo_epi8(lo, hi);
                    __m512 w0, w1;
                    if (brain) {
                        w0 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
                        w1 = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
                    } else {
                        w0 = _mm512_cvtph_ps(_mm512_castsi512_si256(pairs));
                        w1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pairs, 1));
                    }
                    TAKE(w0, start + 64 * j + 32 * h, 2 * h);
                    TAKE(w1, start + 64 * j + 32 * h + 16, 2 * h + 1);
                }
            }
        }
    }
    for (long i = 8 * blocks; i < p->W; i++)
        for (int q = 0; q < 4; q++) {
            __m512 w = look_up_quarter(codes_of_quarter(row + i, plane, bits, q), values, bits);
            TAKE(w, 64 * i + 16 * q, q);
        }
#undef TAKE
    finish_512(p, r, M, chains, acc);
}

/* ---- AVX-512 with products of bfloat16: 32 weights at once ---- */
#define WITH_BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")))

/* sum[i] += w[2 i] x[2 i] + w[2 i + 1] x[2 i + 1]. Emulated it runs on processors without the instruction. */
WITH_BF16 INLINE __m512 dot_pairs(__m512 sum, __m512i w, __m512i x, const int emulated) {
    if (!emulated) return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    __m512i odd = _mm512_set1_epi32((int)0xffff0000u);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, odd)), _mm512_castsi512_ps(_mm512_and_si512(x, odd)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), sum);
}

WITH_BF16 INLINE void bf16_row(const Product *p, const uint16_t *x, long r, const int M, const int width, const int emulated) {
    const int bits = width > 4 ? width : p->bits; /* up to 4 they share their code */
    const int chains = M == 1 ? 4 : M <= 3 ? 2 : 1;
    uint16_t values[256] __attribute__((aligned(64)));
    long plane = p->N * p->W, padded = 64 * p->W, blocks = p->K / 512;
    const uint64_t *row = p->planes + r * p->W;
    const uint16_t *table = p->table + (r << bits);
    for (int c = 0; c < 1 << width; c += 16) {
        __m512i entry = _mm512_castps_si512(entries_512(table + c, bits, p->brain)), one = _mm512_set1_epi32(1);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(entry, 16), one); /* to the nearest, ties to even */
        entry = _mm512_add_epi32(entry, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm256_store_si256((__m256i *)(values + c), _mm512_cvtepi32_epi16(_mm512_srli_epi32(entry, 16)));
    }
    if (width == 4) memcpy(values + 16, values, 32); /* the fifth bit of a field is of the next code */
    __m512i first = _mm512_load_si512(values), low[4], high[4], t[8];
    __m512 acc[MOST][4];
    if (bits > 5) split_table(values, bits, low, high);
    for (int m = 0; m < M; m++)
        for (int c = 0; c < 4; c++) acc[m][c] = _mm512_setzero_ps();
#define TAKE(w, at, c) \
    for (int m = 0; m < M; m++) \
        acc[m][(c) % chains] = dot_pairs(acc[m][(c) % chains], w, _mm512_loadu_si512(x + m * padded + (at)), emulated)
    for (long i = 0; i < blocks; i++) {
        long start = 512 * i;
        codes_of_block(row + 8 * i, plane, bits, width, t);
        if (width == 4) {
            for (int n = 0; n < 4; n++)
                for (int j = 0; j < 4; j++) {
                    __m512i w = _mm512_permutexvar_epi16(t[j], first);
                    TAKE(w, start + 32 * (4 * n + j), j);
                    t[j] = _mm512_srli_epi16(t[j], 4);
                }
        } else if (width == 5) {
            for (int j = 0; j < 8; j++)
                for (int n = 0; n < 2; n++) {
                    __m512i w = _mm512_permutexvar_epi16(t[j], first);
                    TAKE(w, start + 32 * (2 * j + n), 2 * (j % 2) + n);
                    t[j] = _mm512_srli_epi16(t[j], 8);
                }
        } else {
            for (int j = 0; j < 8; j++) {
                __m512i lo = look_up_bytes(low, t[j], bits), hi = look_up_bytes(high, t[j], bits);
                TAKE(_mm512_unpacklo_epi8(lo, hi), start + 64 * j, 2 * (j % 2));
                TAKE(_mm512_unpackhi_epi8(lo, hi), start + 64 * j + 32, 2 * (j % 2) + 1);
            }
        }
    }
    for (long i = 8 * blocks; i < p->W; i++)
        for (int h = 0; h < 2; h++) {
            __m256i halves[2];
            for (int q = 0; q < 2; q++)
                halves[q] = _mm512_cvtepi32_epi16(codes_of_quarter(row + i, plane, bits, 2 * h + q));
            __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1), w;
            if (bits <= 5) w = _mm512_permutexvar_epi16(codes, first);
            else {
                uint16_t found[32], at[32];
                _mm512_storeu_si512(at, codes);
                for (int k = 0; k < 32; k++) found[k] = values[at[k]];
                w = _mm512_loadu_si512(found);
            }
            TAKE(w, 64 * i + 32 * h, h);
        }
#undef TAKE
    finish_512(p, r, M, chains, acc);
}

/* A function for each number of rows of x and width of the codes (4 stands for up to 4), so that loops over them are unrolled. */
typedef void (*Row)(const Product *, const void *, long);
static const int rows_of[4] = {1, 2, 4, 8};
#define AVX2_ROW(M) \
    WITH_AVX2 static void avx2_##M(const Product *p, const void *x, long r) { avx2_row(p, x, r, M); }
#define AVX512_ROW(width, M) \
    WITH_AVX512 static void avx512_##width##_##M(const Product *p, const void *x, long r) { \
        if (width > 5 && p->brain) avx512_row(p, x, r, M, width, 1); \
        else avx512_row(p, x, r, M, width, 0); \
    }
#define BF16_ROW(width, M) \
    WITH_BF16 static void bf16_##width##_##M(const Product *p, const void *x, long r) { bf16_row(p, x, r, M, width, 0); }
#define EMULATED_ROW(width) \
    WITH_BF16 static void emulated_##width(const Product *p, const void *x, long r) { bf16_row(p, x, r, 4, width, 1); }
#define EACH_M(ROW, width) ROW(width, 1) ROW(width, 2) ROW(width, 4) ROW(width, 8)
#define EACH(ROW) EACH_M(ROW, 4) EACH_M(ROW, 5) EACH_M(ROW, 6) EACH_M(ROW, 7) EACH_M(ROW, 8)
#define NAMES(name, width) {name##_##width##_1, name##_##width##_2, name##_##width##_4, name##_##width##_8}
#define ALL(name) {NAMES(name, 4), NAMES(name, 5), NAMES(name, 6), NAMES(name, 7), NAMES(name, 8)}
AVX2_ROW(1) AVX2_ROW(2) AVX2_ROW(4) AVX2_ROW(8)
EACH(AVX512_ROW)
EACH(BF16_ROW)
EMULATED_ROW(4) EMULATED_ROW(5) EMULATED_ROW(6) EMULATED_ROW(7) EMULATED_ROW(8)
static const Row avx2_rows[4] = {avx2_1, avx2_2, avx2_4, avx2_8};
static const Row avx512_rows[5][4] = ALL(avx512), bf16_rows[5][4] = ALL(bf16);
static const Row emulated_rows[5] = {emulated_4, emulated_5, emulated_6, emulated_7, emulated_8};

WITH_AVX512 static void dequantize_row_512(const Dequantization *d, const uint64_t *row, const float *values, long r) {
    long plane = d->N * d->W, whole = d->K / 64;
    for (long i = 0; i < whole; i++)
        for (int q = 0; q < 4; q++) {
            __m512 w = look_up_quarter(codes_of_quarter(row + i, plane, d->bits, q), values, d->bits);
            long at = (r - d->first) * d->K + 64 * i + 16 * q;
            if (d->brain_out) {
                __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(w), 16);
                _mm256_storeu_si256((__m256i *)((uint16_t *)d->out + at), _mm512_cvtepi32_epi16(upper));
            } else
                _mm512_storeu_ps((float *)d->out + at, w);
        }
}
#else
typedef void (*Row)(const Product *, const void *, long);
#endif

/* The best instructions of this processor, as above. */
int best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi");
    if (wide && __builtin_cpu_supports("avx512bf16")) return AVX512_BF16;
    if (wide) return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return SCALAR;
}

/* Returns 0, or 1 where there is no memory. */
int multiply(const Product *p) {
    Row row = scalar_row;
    const void *x = p->x;
    void *ordered = NULL;
#if defined(__x86_64__)
    int order = NATURAL, block = 512, brain = p->isa >= AVX512_BF16, width = p->bits < 4 ? 4 : p->bits, of_m = 0;
    while (rows_of[of_m] < p->M) of_m++;
    if (p->isa == AVX2 && p->bits <= 4) row = avx2_rows[of_m], order = NIBBLES_8_LANES, block = 256;
    if (p->isa == AVX512) row = avx512_rows[width - 4][of_m];
    if (p->isa == AVX512_BF16) row = bf16_rows[width - 4][of_m];
    if (p->isa == AVX512_BF16_EMULATED) row = emulated_rows[width - 4], of_m = 2;
    if (p->isa >= AVX512)
        order = width == 4 ? (brain ? NIBBLES_16 : NIBBLES_32) : width == 5 ? (brain ? BYTES_16 : BYTES_32)
                : brain ? SPLIT_16 : p->brain ? SPLIT_BRAIN : SPLIT_HALF;
    if (order != NATURAL) {
        long size = (long)rows_of[of_m] * p->W * 64 * (brain ? 2 : 4);
        x = ordered = aligned_alloc(64, (size + 63) / 64 * 64);
        if (!ordered) return 1;
        reorder(p, rows_of[of_m], order, block, brain ? NULL : ordered, brain ? ordered : NULL);
    }
#endif
#pragma omp parallel for num_threads(p->threads) schedule(static) if (p->N * p->K >= WORTH)
    for (long r = 0; r < p->N; r++) row(p, x, r);
    free(ordered);
    return 0;
}

void dequantize(const Dequantization *d) {
#pragma omp parallel for num_threads(d->threads) schedule(static) if ((d->last - d->first) * d->K >= WORTH)
    for (long r = d->first; r < d->last; r++) {
        float values[256], w[64];
        const uint64_t *row = d->planes + r * d->W;
        long from = 0;
        row_of_table(d->table + (r << d->bits), d->bits, d->brain, values);
        for (int c = 1 << d->bits; c < 32; c++) values[c] = 0.0f; /* whole vectors of them are loaded */
        if (d->brain_out)
            for (int c = 0; c < 1 << d->bits; c++) values[c] = from_brain(to_brain(values[c]));
#if defined(__x86_64__)
        if (d->isa >= AVX512) {
            dequantize_row_512(d, row, values, r);
            from = d->K / 64;
        }
#endif
        for (long i = from; i < d->W; i++) {
            int count = weights_of(d->K, i);
            long at = (r - d->first) * d->K + 64 * i;
            decode_word(row + i, d->N * d->W, d->bits, values, count, w);
            for (int k = 0; k < count; k++)
                if (d->brain_out) ((uint16_t *)d->out)[at + k] = to_brain(w[k]);
                else ((float *)d->out)[at + k] = w[k];
        }
    }
}

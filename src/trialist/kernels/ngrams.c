/* Finds phrases (n-grams, and shorter texts that are searched whole) in running text, exactly. ngrams.py holds the contract.
 *
 * A text is read once, some hundred words at a time, in stages whose memory accesses do not wait for each other: cut it into
 * words; look these up in the vocabulary of the phrases (a word that is not there ends the run of known words); for every
 * length of phrase that may end with a word, hash the last words; ask a bit filter, then a table. Hashes only propose:
 * letters of words and numbers of words are always compared.
 */
#include <stdint.h>
#include <string.h>

enum { BETWEEN, IN_WORD, ALONE, SKIPPED }; /* what a byte does, in `kind`; BREAK_BYTE ends a run of words */
enum { LONGEST = 64, BATCH = 256, ASKED = 1024 };
#define UNKNOWN UINT32_MAX
#define BREAK_BYTE 0xff /* never part of UTF-8 */

typedef struct {
    uint64_t head, next;       /* letters 0 to 7 and 8 to 15, zeros behind the last */
    uint64_t endings;          /* bit m - 1: a phrase of m words ends with this word */
    uint32_t number, length;   /* number + 1; 0 is a free place */
} word_slot;                   /* half a cache line, which is all that most words need */

typedef struct {
    uint32_t tag, number;      /* tag: 26 bits of the hash and length - 1; number + 1, 0 is a free place */
} phrase_slot;

typedef struct {
    const uint8_t *kind;            /* 256 */
    const uint8_t *letters;         /* word w is letters[letter_at[w] .. letter_at[w + 1]], with eight bytes behind the last */
    const int64_t *letter_at;
    word_slot *words;               /* open addressing, sizes are powers of two */
    phrase_slot *phrases;
    const uint32_t *flat;           /* word numbers of all indexed texts */
    const int64_t *phrase_at;       /* where in `flat` a phrase stands first */
    uint64_t *filter;               /* one bit for each hash of a phrase */
    uint64_t *endings;              /* as in word_slot, by number */
    uint32_t *stamp;                /* the last document in which a phrase was found */
    uint8_t *scratch;               /* letters of a batch: BATCH * (longest_word + 2) + 8 */
    uint64_t word_mask, phrase_mask, filter_mask, hash_mask;
    uint64_t fold;                  /* 0x20 in each byte where capital letters are lowered, else 0 */
    int64_t longest_word, plain;    /* plain: bytes are BETWEEN or IN_WORD only */
} index_t;

typedef struct {
    uint32_t *document, *phrase;    /* hits; `document` counts within the call */
    int64_t *begin, *end;           /* bytes of the text, where every occurrence is wanted */
    int64_t room, count, next;      /* next: the first document that is not searched yet */
} hits_t;

static inline uint64_t mixed(uint64_t h) {
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

/* A phrase w_1 .. w_m has the hash sum_i x(w_i) FACTOR^(m - i): the difference of two hashes of all words up to a place. */
#define FACTOR 0xd1342543de82ef95u
static uint64_t power[LONGEST + 1];

static void set_powers(void) {
    power[0] = 1;
    for (int i = 0; i < LONGEST; i++) power[i + 1] = power[i] * FACTOR;
}

static inline uint64_t appended(uint64_t h, uint32_t word) { return h * FACTOR + (word + 1ull) * 0x9e3779b97f4a7c15u; }

static inline uint64_t phrase_hash(uint64_t until, uint64_t before, int length) {
    return mixed(until - before * power[length] + (uint64_t)length);
}

/* Up to eight letters, capitals of ASCII lowered, zeros behind. Reads eight bytes whatever the length. */
static inline uint64_t head_of(const uint8_t *letters, int64_t length, uint64_t fold) {
    uint64_t head, low;
    memcpy(&head, letters, 8);
    if (length < 8) head &= (1ull << 8 * length) - 1;
    low = head & 0x7f7f7f7f7f7f7f7fu; /* the top bit of each byte of the sums tells whether its letter is above '@', above 'Z' */
    return head | ((((low + 0x3f3f3f3f3f3f3f3fu) ^ (low + 0x2525252525252525u)) & ~head & 0x8080808080808080u) >> 2 & fold);
}

static inline uint64_t word_hash(const uint8_t *letters, int64_t length, uint64_t fold) {
    uint64_t h = (uint64_t)length * 0x9e3779b97f4a7c15u;
    for (; length > 0; letters += 8, length -= 8) h = mixed((h ^ head_of(letters, length, fold)) * 0x9e3779b97f4a7c15u);
    return h;
}

static inline const word_slot *find_word(const index_t *x, uint64_t h, const uint8_t *letters, int64_t length) {
    uint64_t head = head_of(letters, length, x->fold), next = length > 8 ? head_of(letters + 8, length - 8, x->fold) : 0;
    for (uint64_t at = h & x->word_mask; x->words[at].number; at = (at + 1) & x->word_mask) {
        const word_slot *w = x->words + at;
        if (w->head != head || w->next != next || w->length != (uint32_t)length) continue;
        int64_t i = 16;
        if (i < length) {
            const uint8_t *stored = x->letters + x->letter_at[w->number - 1];
            while (i < length && head_of(stored + i, length - i, 0) == head_of(letters + i, length - i, x->fold)) i += 8;
        }
        if (i >= length) return w;
    }
    return NULL;
}

static inline uint32_t tag_of(uint64_t h, int length) { return (uint32_t)(h >> 32) << 6 | (uint32_t)(length - 1); }

static inline uint32_t find_phrase(const index_t *x, uint64_t h, const uint32_t *last, int length) {
    uint32_t tag = tag_of(h, length);
    for (uint64_t at = h & x->phrase_mask; x->phrases[at].number; at = (at + 1) & x->phrase_mask) {
        if (x->phrases[at].tag != tag) continue;
        uint32_t p = x->phrases[at].number - 1;
        if (!memcmp(x->flat + x->phrase_at[p], last + 1 - length, 4 * (size_t)length)) return p;
    }
    return UNKNOWN;
}

/* Enters `count` different words into the table. */
void ngrams_words(const index_t *x, int64_t count) {
    set_powers();
    for (int64_t w = 0; w < count; w++) {
        const uint8_t *letters = x->letters + x->letter_at[w];
        int64_t length = x->letter_at[w + 1] - x->letter_at[w];
        uint64_t at = word_hash(letters, length, 0) & x->hash_mask & x->word_mask;
        while (x->words[at].number) at = (at + 1) & x->word_mask;
        uint64_t next = length > 8 ? head_of(letters + 8, length - 8, 0) : 0;
        x->words[at] = (word_slot){head_of(letters, length, 0), next, 0, (uint32_t)w + 1, (uint32_t)length};
    }
}

/* Numbers the phrases flat[starts[i] .. + lengths[i]], equal ones alike, in the order of their first places; returns how many. */
int64_t ngrams_phrases(const index_t *x, const int64_t *starts, const uint8_t *lengths, int64_t count, int64_t *phrase_at,
                       uint32_t *number) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        int length = lengths[i];
        const uint32_t *last = x->flat + starts[i] + length - 1;
        uint64_t h = 0;
        for (int k = 1 - length; k <= 0; k++) h = appended(h, last[k]);
        h = phrase_hash(h, 0, length) & x->hash_mask;
        uint32_t p = find_phrase(x, h, last, length);
        if (p == UNKNOWN) {
            p = (uint32_t)found++;
            phrase_at[p] = starts[i];
            uint64_t at = h & x->phrase_mask;
            while (x->phrases[at].number) at = (at + 1) & x->phrase_mask;
            x->phrases[at] = (phrase_slot){tag_of(h, length), p + 1};
            uint64_t bit = h >> 8 & x->filter_mask;
            x->filter[bit >> 6] |= 1ull << (bit & 63);
            x->endings[*last] |= 1ull << (length - 1);
        }
        number[i] = p;
    }
    for (uint64_t at = 0; at <= x->word_mask; at++)
        if (x->words[at].number) x->words[at].endings = x->endings[x->words[at].number - 1];
    return found;
}

typedef struct {
    uint32_t number[LONGEST + BATCH]; /* words of this batch from LONGEST on, behind those before it */
    uint64_t hash[LONGEST + BATCH];   /* of all words up to each */
    uint64_t endings[BATCH];
    int64_t begin[LONGEST + BATCH], end[LONGEST + BATCH];
    int64_t known;                    /* known words in a row at the end of the batch before */
    uint32_t document, stamp;
} words_t;

/* Looks for the phrases that end within the batch of `count` words. Returns whether there was room for the hits. */
static inline int ask(const index_t *x, words_t *t, int64_t count, hits_t *hits, const int everywhere) {
    uint64_t hash[ASKED];
    uint16_t word[ASKED];
    uint8_t length[ASKED];
    int64_t asked = 0, known = t->known;
    for (int64_t i = 0; i <= count; i++) {
        if (i == count || asked > ASKED - LONGEST) {
            int64_t passed = 0;
            for (int64_t k = 0; k < asked; k++) {
                uint64_t bit = hash[k] >> 8 & x->filter_mask;
                hash[passed] = hash[k], word[passed] = word[k], length[passed] = length[k];
                __builtin_prefetch(x->phrases + (hash[k] & x->phrase_mask));
                passed += x->filter[bit >> 6] >> (bit & 63) & 1;
            }
            for (int64_t k = 0; k < passed; k++) {
                const uint32_t *last = t->number + LONGEST + word[k];
                uint32_t p = find_phrase(x, hash[k], last, length[k]);
                if (p == UNKNOWN) continue;
                if (!everywhere && x->stamp[p] == t->stamp) continue;
                if (hits->count == hits->room) return 0;
                x->stamp[p] = t->stamp;
                hits->document[hits->count] = t->document;
                hits->phrase[hits->count] = p;
                if (everywhere) {
                    hits->begin[hits->count] = t->begin[LONGEST + word[k] + 1 - length[k]];
                    hits->end[hits->count] = t->end[LONGEST + word[k]];
                }
                hits->count++;
            }
            asked = 0;
            if (i == count) break;
        }
        const uint32_t *last = t->number + LONGEST + i;
        t->hash[LONGEST + i] = appended(t->hash[LONGEST + i - 1], *last);
        if (*last == UNKNOWN) {
            known = 0;
            continue;
        }
        known++;
        uint64_t lengths = t->endings[i];
        if (known < LONGEST) lengths &= (1ull << known) - 1;
        for (; lengths; lengths &= lengths - 1) {
            int size = __builtin_ctzll(lengths) + 1;
            length[asked] = (uint8_t)size;
            hash[asked] = phrase_hash(t->hash[LONGEST + i], t->hash[LONGEST + i - size], size) & x->hash_mask;
            __builtin_prefetch(x->filter + ((hash[asked] >> 8 & x->filter_mask) >> 6));
            word[asked++] = (uint16_t)i;
        }
    }
    t->known = known < LONGEST ? known : LONGEST;
    memmove(t->number, t->number + count, LONGEST * sizeof *t->number);
    memmove(t->hash, t->hash + count, LONGEST * sizeof *t->hash);
    if (everywhere) {
        memmove(t->begin, t->begin + count, LONGEST * sizeof *t->begin);
        memmove(t->end, t->end + count, LONGEST * sizeof *t->end);
    }
    return 1;
}

typedef struct {
    const uint8_t *first[BATCH];
    int64_t length[BATCH], count; /* length 0 stands for an unknown word or a break */
} batch_t;

static inline int look_up(const index_t *x, words_t *t, batch_t *b, hits_t *hits, const int everywhere) {
    uint64_t hash[BATCH];
    for (int64_t i = 0; i < b->count; i++) {
        hash[i] = word_hash(b->first[i], b->length[i], x->fold) & x->hash_mask;
        __builtin_prefetch(x->words + (hash[i] & x->word_mask));
    }
    for (int64_t i = 0; i < b->count; i++) {
        const word_slot *w = b->length[i] ? find_word(x, hash[i], b->first[i], b->length[i]) : NULL;
        t->number[LONGEST + i] = w ? w->number - 1 : UNKNOWN;
        t->endings[i] = w ? w->endings : 0;
    }
    int64_t count = b->count;
    b->count = 0;
    return ask(x, t, count, hits, everywhere);
}

/* Words between bytes that separate: 64 bytes at a time become bits, and where bits change a word begins or ends. */
static inline int read_plain(const index_t *x, words_t *t, hits_t *hits, const uint8_t *text, int64_t at, int64_t end,
                             const int everywhere) {
    const uint8_t *kind = x->kind;
    batch_t b = {.count = 0};
    uint64_t before = 0;
    int64_t first = -1;
    t->known = 0;
    for (; at < end || first >= 0; at += 64) {
        uint64_t inside = 0;
        int64_t size = end - at < 64 ? end - at : 64;
        for (int64_t i = 0; i < size; i++) inside |= (uint64_t)(kind[text[at + i]] & 1) << i; /* IN_WORD is 1, BETWEEN 0 */
        for (uint64_t edges = inside ^ (inside << 1 | before); edges; edges &= edges - 1) {
            int64_t edge = at + __builtin_ctzll(edges);
            if (first < 0) {
                first = edge;
                continue;
            }
            if (everywhere) t->begin[LONGEST + b.count] = first, t->end[LONGEST + b.count] = edge;
            b.first[b.count] = text + first;
            b.length[b.count++] = edge - first > x->longest_word ? 0 : edge - first;
            first = -1;
            if (b.count == BATCH && !look_up(x, t, &b, hits, everywhere)) return 0;
        }
        before = inside >> 63;
    }
    return look_up(x, t, &b, hits, everywhere);
}

/* The same with bytes that are words by themselves or are left out of words. */
static inline int read_any(const index_t *x, words_t *t, hits_t *hits, const uint8_t *text, int64_t at, int64_t end,
                           const int everywhere) {
    const uint8_t *kinds = x->kind;
    const int64_t most = x->longest_word + 1; /* a longer word is unknown whatever follows */
    batch_t b = {.count = 0};
    uint8_t *letters = x->scratch;
    t->known = 0;
    while (at < end) {
        uint8_t kind = kinds[text[at]];
        if (kind == BETWEEN || kind == SKIPPED) {
            at++;
            continue;
        }
        int64_t size = 0, begin = at, behind = at + 1;
        if (kind == IN_WORD) {
            do {
                if (kind == IN_WORD) {
                    letters[size] = text[at];
                    size += size < most;
                    behind = at + 1;
                }
                at++;
            } while (at < end && ((kind = kinds[text[at]]) == IN_WORD || kind == SKIPPED));
            if (size == most) size = 0;
        } else {
            letters[0] = text[at++];
            size = 1;
        }
        if (everywhere) t->begin[LONGEST + b.count] = begin, t->end[LONGEST + b.count] = behind;
        b.first[b.count] = letters;
        b.length[b.count++] = size;
        letters += size;
        if (b.count < BATCH) continue;
        if (!look_up(x, t, &b, hits, everywhere)) return 0;
        letters = x->scratch;
    }
    return look_up(x, t, &b, hits, everywhere);
}

static inline int read_text(const index_t *x, words_t *t, hits_t *hits, const uint8_t *text, int64_t at, int64_t end,
                            const int everywhere) {
    for (;;) { /* from break to break */
        const uint8_t *found = at < end ? memchr(text + at, BREAK_BYTE, (size_t)(end - at)) : NULL;
        int64_t stop = found ? found - text : end;
        if (!(x->plain ? read_plain : read_any)(x, t, hits, text, at, stop, everywhere)) return 0;
        if (!found) return 1;
        at = stop + 1;
    }
}

static inline int read_numbers(const index_t *x, words_t *t, hits_t *hits, const uint32_t *numbers, int64_t at, int64_t end,
                               const int everywhere) {
    t->known = 0;
    while (at < end) {
        int64_t count = end - at < BATCH ? end - at : BATCH;
        memcpy(t->number + LONGEST, numbers + at, count * sizeof *numbers);
        for (int64_t i = 0; i < count; i++) t->endings[i] = numbers[at + i] == UNKNOWN ? 0 : x->endings[numbers[at + i]];
        for (int64_t i = 0; everywhere && i < count; i++) t->begin[LONGEST + i] = at + i, t->end[LONGEST + i] = at + i + 1;
        if (!ask(x, t, count, hits, everywhere)) return 0;
        at += count;
    }
    return 1;
}

/* Searches documents starts[d] .. starts[d + 1] of the text, which eight bytes follow, or of the word numbers where `text` is NULL, from hits->next on;
 * each phrase once a document or, where hits->begin is given, every occurrence. UNKNOWN among the numbers stands for any word
 * that no phrase has, and for a break. `first_stamp + d` must differ from the stamps of all other documents and from 0.
 * Ends early, before a document, when there is no room for its hits. */
void ngrams_search(const index_t *x, hits_t *hits, const uint8_t *text, const uint32_t *numbers, const int64_t *starts,
                   int64_t documents, uint32_t first_stamp) {
    words_t t;
    memset(&t, 0, sizeof t);
    for (; hits->next < documents; hits->next++) {
        int64_t before = hits->count, d = hits->next, from = starts[d], to = starts[d + 1];
        int whole;
        t.document = (uint32_t)d;
        t.stamp = first_stamp + (uint32_t)d;
        if (hits->begin) whole = text ? read_text(x, &t, hits, text, from, to, 1) : read_numbers(x, &t, hits, numbers, from, to, 1);
        else whole = text ? read_text(x, &t, hits, text, from, to, 0) : read_numbers(x, &t, hits, numbers, from, to, 0);
        if (whole) continue;
        while (hits->count > before) x->stamp[hits->phrase[--hits->count]] = 0;
        return;
    }
}

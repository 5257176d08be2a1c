/* The inner loops over tags, in C: one function for each in mtetool/loops_numpy.py, which documents
 * them and is the reference that tests compare them with. No policy or format is decided here.
 *
 * Tags are one byte per granule. Every function accepts any bytes and any lengths: callers'
 * mistakes and hostile snapshots end in ValueError. The GIL is released.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the loops over words need a little-endian processor"
#endif

static inline uint64_t
word(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Compiled twice where the loader can choose: today's processors do more at a time. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define FOR_EACH_PROCESSOR
#endif
/* Lengths from this one on are stored apart from the others. */
#define LONG 16
#define INLINE static inline __attribute__((always_inline))

#ifdef __SSE2__
/* A bit for each of 64 granules, set if its tag differs from that of the granule before. */
INLINE uint64_t
changes_of_64(const uint8_t *here)
{
    uint64_t same = 0;
    for (int i = 0; i < 4; i++) {
        __m128i mine = _mm_loadu_si128((const __m128i *)(here + 16 * i));
        __m128i before = _mm_loadu_si128((const __m128i *)(here + 16 * i - 1));
        uint64_t bits = (uint16_t)_mm_movemask_epi8(_mm_cmpeq_epi8(mine, before));
        same |= bits << 16 * i;
    }
    return ~same;
}
#else
/* A bit for each of the eight bytes, set if the byte is not 0. */
INLINE uint64_t
nonzero_bytes(uint64_t bytes)
{
    uint64_t high = (((bytes & 0x7f7f7f7f7f7f7f7f) + 0x7f7f7f7f7f7f7f7f) | bytes);
    return ((high & 0x8080808080808080) >> 7) * 0x0102040810204080 >> 56;
}

/* A bit for each of 64 granules, set if its tag differs from that of the granule before. */
INLINE uint64_t
changes_of_64(const uint8_t *here)
{
    uint64_t changes[8], any = 0, mask = 0;
    for (int i = 0; i < 8; i++)
        any |= changes[i] = word(here + 8 * i) ^ word(here + 8 * i - 1);
    if (any)
        for (int i = 0; i < 8; i++)
            mask |= nonzero_bytes(changes[i]) << 8 * i;
    return mask;
}
#endif

/* changes_of_64 for tags + at; the very first granule is not a change. */
INLINE uint64_t
changes_at(const uint8_t *tags, size_t at)
{
    if (at)
        return changes_of_64(tags + at);
    uint8_t behind[80];
    memset(behind, tags[0], 16);
    memcpy(behind + 16, tags, 64);
    return changes_of_64(behind + 16);
}

struct count {
    size_t runs, tagged, pages;
    uint8_t bits;
};

/* Count how many of `part` granules, at most 255, have a tag. */
INLINE size_t
count_tagged(const uint8_t *tags, size_t part, uint8_t *bits)
{
    uint8_t n = 0, seen = 0;
    for (size_t i = 0; i < part; i++) {
        n += tags[i] != 0;
        seen |= tags[i];
    }
    *bits |= seen;
    return n;
}

FOR_EACH_PROCESSOR static void
scan(const uint8_t *tags, size_t n, size_t page, struct count *count)
{
    for (size_t at = 0; at < n;) {
        size_t in_page = 0;
        for (size_t end = at + page; at < end; at += 128) {
            uint8_t changes = at && tags[at] != tags[at - 1];
            for (size_t i = 1; i < 128; i++)
                changes += tags[at + i] != tags[at + i - 1];
            count->runs += changes;
            in_page += count_tagged(tags + at, 128, &count->bits);
        }
        count->tagged += in_page;
        count->pages += in_page != 0;
    }
}

/* Runs as they are found: their lengths (0 for those above 15, kept in `longs`) and their tags. */
struct runs {
    uint8_t *lengths, *values, *longs;
    size_t n, start;
};

INLINE void
end_run(struct runs *runs, size_t stop)
{
    size_t length = stop - runs->start, rest = length - LONG;
    runs->lengths[runs->n++] = length < LONG ? (uint8_t)length : 0;
    runs->start = stop;
    if (length < LONG)
        return;
    for (; rest >= 128; rest >>= 7)
        *runs->longs++ = (uint8_t)(rest | 128);
    *runs->longs++ = (uint8_t)rest;
}

/* Where objects of one size lie side by side, as in a slab, and some neighbours have the same tag
 * by chance, add the boundary between them: equal lengths compress to next to nothing. Sizes are
 * powers of two, and at least three quarters of the boundaries must be there. */
INLINE uint64_t
with_objects(uint64_t changes)
{
    int n = __builtin_popcountll(changes);
    if (changes & 0xaaaaaaaaaaaaaaaa)
        return n >= 48 ? ~0ull : changes;
    if (changes & 0x4444444444444444)
        return n >= 24 ? 0x5555555555555555 : changes;
    if (changes & 0x1010101010101010)
        return n >= 12 ? 0x1111111111111111 : changes;
    if (changes & 0x0100010001000100)
        return n >= 6 ? 0x0101010101010101 : changes;
    return n >= 3 ? 0x0001000100010001 : changes;
}

/* Record the changes among the 64 granules from `at` on. */
INLINE void
take_changes(struct runs *runs, const uint8_t *tags, size_t at, uint64_t changes)
{
    if (!changes)
        return;
    end_run(runs, at + (size_t)__builtin_ctzll(changes));
    size_t n = runs->n, start = runs->start;
    uint8_t *longs = runs->longs;
    runs->values[n] = tags[start];
    if (changes == ~0ull) {
        memset(runs->lengths + n, 1, 63);
        memcpy(runs->values + n + 1, tags + start + 1, 63);
        n += 63;
        start += 63;
    }
    else
        for (changes &= changes - 1; changes; changes &= changes - 1) {
            /* Shorter than 64, so a long length takes one byte. */
            size_t stop = at + (size_t)__builtin_ctzll(changes), length = stop - start;
            if (__builtin_expect(length >= LONG, 0)) {
                *longs++ = (uint8_t)(length - LONG);
                length = 0;
            }
            runs->lengths[n++] = (uint8_t)length;
            runs->values[n] = tags[stop];
            start = stop;
        }
    runs->n = n;
    runs->start = start;
    runs->longs = longs;
}

INLINE void
pack(const uint8_t *restrict from, size_t n, uint8_t *restrict to)
{
    for (size_t i = 0; i < n / 2; i++) {
        uint16_t pair;
        memcpy(&pair, from + 2 * i, sizeof pair);
        to[i] = (uint8_t)(pair | pair >> 4);
    }
    if (n % 2)
        to[n / 2] = from[n - 1];
}

/* Count like `scan`, and write the runs to `out`, which is as long as the tags: lengths and tags,
 * two per byte each, then the long lengths. Returns the bytes written, or 0 if there are more than
 * a quarter as many runs as granules, which are then only counted. */
FOR_EACH_PROCESSOR static size_t
write_runs(const uint8_t *tags, size_t n, size_t page, uint8_t *out, struct count *count)
{
    size_t most = n / 4;
    uint8_t *longs = out + most; /* at most n / 16, as each byte stands for 16 granules or more */
    struct runs runs = {.lengths = out + 2 * most, .values = out + 3 * most, .longs = longs};
    runs.values[0] = tags[0];
    for (size_t at = 0; at < n;) {
        size_t in_page = 0;
        for (size_t end = at + page; at < end; at += 128) {
            uint64_t low = changes_at(tags, at), high = changes_of_64(tags + at + 64);
            if (!(low | high)) {
                in_page += tags[at] ? 128 : 0;
                count->bits |= tags[at];
                continue;
            }
            in_page += count_tagged(tags + at, 128, &count->bits);
            low = with_objects(low);
            if (!at)
                low &= ~1ull; /* there is nothing before it */
            high = with_objects(high);
            if (runs.n + (size_t)(__builtin_popcountll(low) + __builtin_popcountll(high)) >= most) {
                *count = (struct count){.runs = 1};
                scan(tags, n, page, count);
                return 0;
            }
            take_changes(&runs, tags, at, low);
            take_changes(&runs, tags, at + 64, high);
        }
        count->tagged += in_page;
        count->pages += in_page != 0;
    }
    end_run(&runs, n);
    count->runs = runs.n;
    size_t half = (runs.n + 1) / 2, n_longs = (size_t)(runs.longs - longs);
    memmove(out + 2 * half, longs, n_longs);
    pack(runs.lengths, runs.n, out);
    pack(runs.values, runs.n, out + half);
    return 2 * half + n_longs;
}

/* The reverse of write_runs, from three buffers. Returns 1, or 0 for anything that it would not
 * have written for n tags, except that neighbours may have the same tag. */
static int
read_runs(const uint8_t *lengths, const uint8_t *values, const uint8_t *longs, size_t n_longs,
          size_t n_runs, uint8_t *tags, size_t n)
{
    const uint8_t *end = longs + n_longs;
    size_t at = 0;
    for (size_t run = 0; run < n_runs; run++) {
        size_t length = lengths[run / 2] >> 4 * (run & 1) & 15;
        uint8_t tag = values[run / 2] >> 4 * (run & 1) & 15;
        if (__builtin_expect(length && n - at >= 16, 1)) {
            memset(tags + at, tag, 16); /* the next runs overwrite the excess */
            at += length;
            continue;
        }
        if (!length) {
            int shift = 0;
            uint8_t byte;
            do {
                if (longs == end || shift >= 42)
                    return 0;
                byte = *longs++;
                length |= (size_t)(byte & 127) << shift;
                shift += 7;
            } while (byte & 128);
            length += LONG;
        }
        if (length > n - at)
            return 0;
        memset(tags + at, tag, length);
        at += length;
    }
    int odd_is_clear = !(n_runs & 1) || ((lengths[n_runs / 2] | values[n_runs / 2]) & 0xf0) == 0;
    return at == n && longs == end && odd_is_clear;
}

static int
has_tag(const uint8_t *tags, size_t n)
{
    uint64_t any = 0;
    for (size_t i = 0; i < n; i += 8)
        any |= word(tags + i);
    return any != 0;
}

static size_t
first_difference(const uint8_t *a, const uint8_t *b, size_t n)
{
    size_t at = 0;
    for (; n - at >= 4096 && memcmp(a + at, b + at, 4096) == 0; at += 4096)
        ;
    while (at < n && a[at] == b[at])
        at++;
    return at;
}

/* What `ram_records` counted, and where the next record begins. */
struct records {
    size_t at, pages, zero_pages, xbzrle_pages;
};

INLINE uint64_t
big_endian_word(const uint8_t *at)
{
    return __builtin_bswap64(word(at));
}

/* `found->at` is at most n, until a page ends beyond the data: that record is the last. */
static void
ram_records(const uint8_t *data, size_t n, uint8_t *marks, size_t n_marks, int page_bits,
            struct records *found)
{
    enum { ZERO = 0x02 | 0x20, PAGE = 0x08 | 0x20, XBZRLE = 0x40 | 0x20 }; /* 0x20: same block */
    const size_t page_bytes = (size_t)1 << page_bits;
    struct records now = *found;
    while (now.at < n && n - now.at >= 8) {
        const uint8_t *here = data + now.at;
        size_t left = n - now.at, length;
        uint64_t head = big_endian_word(here), number = head >> page_bits;
        if (number >= n_marks)
            break;
        switch (head & (page_bytes - 1)) {
        case PAGE:
            now.at += 8 + page_bytes;
            now.pages++;
            break;
        case ZERO:
            if (left < 9 || here[8] != 0)
                goto out;
            now.at += 9;
            now.zero_pages++;
            break;
        case XBZRLE:
            if (left < 11 || here[8] != 1)
                goto out;
            length = (size_t)here[9] << 8 | here[10];
            if (length > page_bytes)
                goto out;
            now.at += 11 + length;
            now.xbzrle_pages++;
            break;
        default:
            goto out;
        }
        marks[number] = 1;
    }
out:
    *found = now;
}

/* --- counting ----------------------------------------------------------------------------- */

/* The numbers that `tally` keeps, in the order in which it is documented. */
struct tally {
    uint64_t granules[16], runs[16], lengths[61], length_granules[61];
    uint64_t longest, next_but_one, next_but_one_same;
    int64_t tag, before;
    uint64_t length;
};

static void
tally_close(struct tally *now)
{
    size_t tag = (size_t)now->tag;
    now->granules[tag] += now->length;
    now->runs[tag]++;
    if (tag) {
        int exponent = 63 - __builtin_clzll(now->length);
        now->lengths[exponent]++;
        now->length_granules[exponent] += now->length;
        if (now->length > now->longest)
            now->longest = now->length;
    }
}

static void
tally(const uint8_t *tags, size_t n, uint64_t repeat, struct tally *now)
{
    for (size_t at = 0; at < n;) {
        const uint8_t tag = tags[at] & 15;
        const uint64_t eight = tags[at] * 0x0101010101010101;
        size_t first = at++;
        while (n - at >= 8 && word(tags + at) == eight)
            at += 8;
        while (at < n && (tags[at] & 15) == tag)
            at++;
        if (tag == now->tag) {
            now->length += (at - first) * repeat;
            continue;
        }
        if (now->tag >= 0) {
            tally_close(now);
            if (now->before > 0) {
                now->next_but_one++;
                now->next_but_one_same += now->before == tag;
            }
        }
        now->before = now->tag;
        now->tag = tag;
        now->length = (at - first) * repeat;
    }
}

/* --- what Python sees --------------------------------------------------------------------- */

/* --- rows of text ------------------------------------------------------------------------- */

/* No row is longer: two numbers of at most 20 digits, two tags, and what is between them. */
#define ROW_MAX 128
enum { ROWS_TEXT, ROWS_JSON };

struct row_run {
    uint64_t ipa, size, key, rows, bytes;
};

INLINE char *
put_text(char *to, const char *text, size_t n)
{
    memcpy(to, text, n);
    return to + n;
}
#define PUT(to, text) put_text(to, text, sizeof(text) - 1)

/* Eight hexadecimal digits, the highest in the lowest byte. */
INLINE uint64_t
hex_digits(uint64_t value)
{
    value = (value & 0xffff0000) << 16 | (value & 0xffff);
    value = (value & 0x0000ff000000ff00) << 8 | (value & 0x000000ff000000ff);
    value = (value & 0x00f000f000f000f0) << 4 | (value & 0x000f000f000f000f);
    uint64_t letters = (value + 0x0606060606060606) >> 4 & 0x0101010101010101;
    return __builtin_bswap64(value + 0x3030303030303030 + letters * ('a' - '9' - 1));
}

/* A hexadecimal number with 0x, to the right in `width` columns (at most 16), or in as many as it
 * takes. Up to 16 bytes behind it are overwritten. */
INLINE char *
put_hex(char *to, uint64_t value, int width)
{
    int digits = (67 - __builtin_clzll(value | 1)) / 4, high = digits > 8 ? digits - 8 : 0;
    uint64_t low = hex_digits(value & 0xffffffff) >> 8 * (8 - (digits - high));
    memset(to, ' ', 16);
    if (width > digits + 2)
        to += width - digits - 2;
    to[0] = '0';
    to[1] = 'x';
    to += 2;
    if (high) {
        uint64_t upper = hex_digits(value >> 32) >> 8 * (8 - high);
        memcpy(to, &upper, sizeof upper);
        to += high;
    }
    memcpy(to, &low, sizeof low);
    return to + digits - high;
}

INLINE char *
put_decimal(char *to, uint64_t value)
{
    static const char pairs[] =
        "0001020304050607080910111213141516171819202122232425262728293031323334353637383940414243444546"
        "4748495051525354555657585960616263646566676869707172737475767778798081828384858687888990919293"
        "949596979899";
    char digits[20], *at = digits + sizeof digits;
    while (value >= 100) {
        at -= 2;
        memcpy(at, pairs + 2 * (value % 100), 2);
        value /= 100;
    }
    if (value >= 10) {
        at -= 2;
        memcpy(at, pairs + 2 * value, 2);
    } else {
        *--at = (char)('0' + value);
    }
    return put_text(to, at, (size_t)(digits + sizeof digits - at));
}

/* The row of a run (or of a granule: size 0) with one tag, or two. */
INLINE char *
put_row(char *to, uint64_t ipa, uint64_t size, unsigned key, int form, int two)
{
    if (form == ROWS_TEXT) {
        to = put_hex(to, ipa, 14);
        if (size) {
            to = PUT(to, "  ");
            to = put_hex(to, size, 12);
        }
        to = PUT(to, "  ");
        if (two) {
            *to++ = "0123456789abcdef"[key >> 4 & 15];
            to = PUT(to, "  ");
        }
        *to++ = "0123456789abcdef"[key & 15];
        *to++ = '\n';
        return to;
    }
    to = put_decimal(PUT(to, "{\"ipa\": "), ipa);
    if (size)
        to = put_decimal(PUT(to, ", \"size_bytes\": "), size);
    if (two) {
        to = put_decimal(PUT(to, ", \"a\": "), key >> 4 & 15);
        to = put_decimal(PUT(to, ", \"b\": "), key & 15);
    } else {
        to = put_decimal(PUT(to, ", \"tag\": "), key & 15);
    }
    return PUT(to, "}\n");
}

/* How many of the `n` tags, at least one, are equal to the first. */
INLINE size_t
equal_tags(const uint8_t *tags, size_t n)
{
    size_t at = 1;
    uint64_t splat = tags[0] * 0x0101010101010101u;
    while (at < n && tags[at] == tags[0]) {
        if (at + 8 <= n) {
            uint64_t other = word(tags + at) ^ splat;
            if (other)
                return at + (size_t)__builtin_ctzll(other) / 8;
            at += 8;
        } else {
            at++;
        }
    }
    return at;
}

/* What `rows` needs besides the tags. */
struct rows {
    uint64_t repeat, ipa;
    unsigned wanted;
    int form;
    char *to, *end;
    struct row_run run;
};

INLINE int
close_run(struct rows *rows, int two)
{
    struct row_run *run = &rows->run;
    if (run->size && (two || rows->wanted >> run->key & 1)) {
        if (rows->end - rows->to < ROW_MAX)
            return 0;
        rows->to = put_row(rows->to, run->ipa, run->size, (unsigned)run->key, rows->form, two);
        run->rows++;
        run->bytes += run->size;
    }
    run->size = 0;
    return 1;
}

/* Add a run; return 0, and do nothing, if there is no room for the one before it. */
INLINE int
add_run(struct rows *rows, size_t at, size_t length, unsigned key, int two)
{
    struct row_run *run = &rows->run;
    uint64_t ipa = rows->ipa + at * rows->repeat * 16, size = length * rows->repeat * 16;
    if (run->size && run->key == key && run->ipa + run->size == ipa) {
        run->size += size;
        return 1;
    }
    if (!close_run(rows, two))
        return 0;
    run->ipa = ipa;
    run->size = size;
    run->key = key;
    return 1;
}

static size_t
run_rows(const uint8_t *tags, size_t n, struct rows *rows)
{
    size_t at = 0;
    while (at < n) {
        size_t length = equal_tags(tags + at, n - at);
        if (!add_run(rows, at, length, tags[at] & 15, 0))
            break;
        at += length;
    }
    return at;
}

static size_t
granule_rows(const uint8_t *tags, size_t n, struct rows *rows)
{
    size_t at = 0;
    for (; at < n && rows->end - rows->to >= ROW_MAX; at++)
        if (rows->wanted >> (tags[at] & 15) & 1) {
            uint64_t ipa = rows->ipa + at * 16;
            rows->to = put_row(rows->to, ipa, 0, tags[at] & 15, rows->form, 0);
            rows->run.rows++;
            rows->run.bytes += 16;
        }
    return at;
}

static size_t
difference_rows(const uint8_t *a, const uint8_t *b, size_t n, struct rows *rows)
{
    size_t at = 0;
    while (at < n) {
        at += first_difference(a + at, b + at, n - at);
        if (at >= n)
            return n;
        if (!((a[at] ^ b[at]) & 15)) {
            at++;
            continue;
        }
        size_t length = 1;
        while (at + length < n && a[at + length] == a[at] && b[at + length] == b[at])
            length++;
        if (!add_run(rows, at, length, (a[at] & 15u) << 4 | (b[at] & 15), 1))
            break;
        at += length;
    }
    return at;
}

static PyObject *
refuse(const char *why, Py_buffer *first, Py_buffer *second)
{
    PyBuffer_Release(first);
    if (second)
        PyBuffer_Release(second);
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

static PyObject *
loops_scan(PyObject *module, PyObject *args)
{
    Py_buffer tags;
    Py_ssize_t page;
    struct count count = {.runs = 1};
    (void)module;
    if (!PyArg_ParseTuple(args, "y*n", &tags, &page))
        return NULL;
    if (page <= 0 || page % 128 || tags.len % page || tags.len == 0)
        return refuse("tags that are not whole pages", &tags, NULL);
    Py_BEGIN_ALLOW_THREADS
    scan(tags.buf, (size_t)tags.len, (size_t)page, &count);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    return Py_BuildValue("nnni", (Py_ssize_t)count.runs, (Py_ssize_t)count.tagged,
                         (Py_ssize_t)count.pages, count.bits);
}

static PyObject *
loops_to_runs(PyObject *module, PyObject *args)
{
    Py_buffer tags, out;
    Py_ssize_t page;
    struct count count = {0};
    size_t written;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nw*", &tags, &page, &out))
        return NULL;
    if (page <= 0 || page % 128 || tags.len % page || tags.len == 0)
        return refuse("tags that are not whole pages", &tags, &out);
    if (tags.len >> 35 || out.len < tags.len)
        return refuse("too little room for the runs", &tags, &out);
    Py_BEGIN_ALLOW_THREADS
    written = write_runs(tags.buf, (size_t)tags.len, (size_t)page, out.buf, &count);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    PyBuffer_Release(&out);
    return Py_BuildValue("nnnin", (Py_ssize_t)count.runs, (Py_ssize_t)count.tagged,
                         (Py_ssize_t)count.pages, count.bits, (Py_ssize_t)written);
}

static PyObject *
loops_from_runs(PyObject *module, PyObject *args)
{
    Py_buffer lengths, values, longs, tags;
    Py_ssize_t n_runs;
    int sound;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*y*nw*", &lengths, &values, &longs, &n_runs, &tags))
        return NULL;
    sound = n_runs >= 0 && lengths.len == n_runs / 2 + n_runs % 2 && values.len == lengths.len;
    if (sound) {
        Py_BEGIN_ALLOW_THREADS
        sound = read_runs(lengths.buf, values.buf, longs.buf, (size_t)longs.len, (size_t)n_runs,
                          tags.buf, (size_t)tags.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&lengths);
    PyBuffer_Release(&values);
    PyBuffer_Release(&longs);
    PyBuffer_Release(&tags);
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "runs that are not those of so many granules");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
loops_page_run(PyObject *module, PyObject *args)
{
    Py_buffer tags;
    Py_ssize_t page, first, at;
    int tagged;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nn", &tags, &page, &first))
        return NULL;
    if (page <= 0 || page % 8 || tags.len % page)
        return refuse("tags that are not whole pages", &tags, NULL);
    Py_ssize_t n_pages = tags.len / page;
    if (first < 0 || first >= n_pages)
        return refuse("no such page", &tags, NULL);
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *bytes = tags.buf;
    tagged = has_tag(bytes + first * page, (size_t)page);
    for (at = first + 1; at < n_pages; at++)
        if (has_tag(bytes + at * page, (size_t)page) != tagged)
            break;
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    return Py_BuildValue("Nn", PyBool_FromLong(tagged), at);
}

static PyObject *
loops_frame_run(PyObject *module, PyObject *args)
{
    Py_buffer entries;
    Py_ssize_t first, at;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*n", &entries, &first))
        return NULL;
    if (entries.len % 8)
        return refuse("entries that are not whole", &entries, NULL);
    if (first < 0 || first >= entries.len / 8)
        return refuse("no such page", &entries, NULL);
    const uint8_t *bytes = entries.buf;
    uint64_t last, next;
    memcpy(&last, bytes + first * 8, 8);
    for (at = first + 1; at < entries.len / 8; at++, last = next) {
        memcpy(&next, bytes + at * 8, 8);
        if (next != last + 1)
            break;
    }
    PyBuffer_Release(&entries);
    return PyLong_FromSsize_t(at);
}

static PyObject *
loops_pack(PyObject *module, PyObject *args)
{
    Py_buffer tags, out;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*", &tags, &out))
        return NULL;
    if (tags.len % 2 || out.len != tags.len / 2)
        return refuse("two tags a byte need half the room", &tags, &out);
    Py_BEGIN_ALLOW_THREADS
    pack(tags.buf, (size_t)tags.len, out.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    PyBuffer_Release(&out);
    Py_RETURN_NONE;
}

static PyObject *
loops_unpack(PyObject *module, PyObject *args)
{
    Py_buffer packed, tags;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*", &packed, &tags))
        return NULL;
    if (tags.len % 2 || packed.len != tags.len / 2)
        return refuse("two tags a byte need twice the room", &packed, &tags);
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *restrict from = packed.buf;
    uint8_t *restrict to = tags.buf;
    for (Py_ssize_t i = 0; i < packed.len; i++) {
        uint16_t pair = (uint16_t)((from[i] | from[i] << 4) & 0x0f0f);
        memcpy(to + 2 * i, &pair, sizeof pair);
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&packed);
    PyBuffer_Release(&tags);
    Py_RETURN_NONE;
}

static PyObject *
loops_first_difference(PyObject *module, PyObject *args)
{
    Py_buffer a, b;
    size_t at;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*", &a, &b))
        return NULL;
    if (a.len != b.len)
        return refuse("tags of different lengths", &a, &b);
    Py_BEGIN_ALLOW_THREADS
    at = first_difference(a.buf, b.buf, (size_t)a.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    return PyLong_FromSize_t(at);
}

static PyObject *
loops_xor(PyObject *module, PyObject *args)
{
    Py_buffer into, other;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*y*", &into, &other))
        return NULL;
    if (into.len != other.len)
        return refuse("tags of different lengths", &into, &other);
    Py_BEGIN_ALLOW_THREADS
    uint8_t *to = into.buf;
    const uint8_t *from = other.buf;
    for (Py_ssize_t i = 0; i < into.len; i++)
        to[i] ^= from[i];
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&into);
    PyBuffer_Release(&other);
    Py_RETURN_NONE;
}

static PyObject *
loops_mask(PyObject *module, PyObject *args)
{
    Py_buffer tags;
    uint8_t bits = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "w*", &tags))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    uint8_t *at = tags.buf;
    for (Py_ssize_t i = 0; i < tags.len; i++)
        bits |= at[i];
    if (bits & 0xf0)
        for (Py_ssize_t i = 0; i < tags.len; i++)
            at[i] &= 15;
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    Py_RETURN_NONE;
}

static PyObject *
loops_ram_records(PyObject *module, PyObject *args)
{
    Py_buffer data, marks;
    Py_ssize_t at;
    int page_bits;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nw*i", &data, &at, &marks, &page_bits))
        return NULL;
    if (at < 0 || at > data.len || page_bits < 10 || page_bits > 16)
        return refuse("no such place, or no such page size", &data, &marks);
    struct records found = {.at = (size_t)at};
    Py_BEGIN_ALLOW_THREADS
    ram_records(data.buf, (size_t)data.len, marks.buf, (size_t)marks.len, page_bits, &found);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    PyBuffer_Release(&marks);
    return Py_BuildValue("nnnn", (Py_ssize_t)found.at, (Py_ssize_t)found.pages,
                         (Py_ssize_t)found.zero_pages, (Py_ssize_t)found.xbzrle_pages);
}

static PyObject *
loops_tally(PyObject *module, PyObject *args)
{
    Py_buffer tags, counts;
    long long repeat;
    struct tally now;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*Lw*", &tags, &repeat, &counts))
        return NULL;
    if (repeat <= 0 || repeat >> 60 || counts.len != sizeof now)
        return refuse("no room for these counts", &tags, &counts);
    memcpy(&now, counts.buf, sizeof now);
    if (now.tag < -1 || now.tag > 15 || now.before < -1 || now.before > 15 ||
        (now.tag >= 0 && (now.length == 0 || now.length >> 61)))
        return refuse("counts that are none", &tags, &counts);
    Py_BEGIN_ALLOW_THREADS
    tally(tags.buf, (size_t)tags.len, (uint64_t)repeat, &now);
    Py_END_ALLOW_THREADS
    memcpy(counts.buf, &now, sizeof now);
    PyBuffer_Release(&tags);
    PyBuffer_Release(&counts);
    Py_RETURN_NONE;
}

static PyObject *
loops_rows(PyObject *module, PyObject *args)
{
    Py_buffer a, b, run, out;
    unsigned long long repeat, ipa;
    int form, each, wanted, two;
    size_t taken;
    struct rows rows;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*KKiiiw*w*", &a, &b, &repeat, &ipa, &form, &each, &wanted, &run,
                          &out))
        return NULL;
    two = b.len != 0;
    if ((two && b.len != a.len) || run.len != sizeof rows.run || out.len < ROW_MAX ||
        repeat == 0 || repeat >> 56 || (each && (two || repeat != 1)) || form < 0 || form > 1) {
        PyBuffer_Release(&run);
        PyBuffer_Release(&out);
        return refuse("rows that cannot be", &a, &b);
    }
    rows.repeat = repeat;
    rows.ipa = ipa;
    rows.form = form;
    rows.wanted = (unsigned)wanted & 0xffff;
    rows.to = out.buf;
    rows.end = rows.to + out.len;
    memcpy(&rows.run, run.buf, sizeof rows.run);
    rows.run.key &= two ? 255 : 15;
    Py_BEGIN_ALLOW_THREADS
    if (two)
        taken = difference_rows(a.buf, b.buf, (size_t)a.len, &rows);
    else if (each)
        taken = granule_rows(a.buf, (size_t)a.len, &rows);
    else
        taken = run_rows(a.buf, (size_t)a.len, &rows);
    Py_END_ALLOW_THREADS
    memcpy(run.buf, &rows.run, sizeof rows.run);
    Py_ssize_t written = rows.to - (char *)out.buf;
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    PyBuffer_Release(&run);
    PyBuffer_Release(&out);
    return Py_BuildValue("nn", (Py_ssize_t)taken, written);
}

static PyMethodDef methods[] = {
    {"scan", loops_scan, METH_VARARGS, NULL},
    {"to_runs", loops_to_runs, METH_VARARGS, NULL},
    {"from_runs", loops_from_runs, METH_VARARGS, NULL},
    {"page_run", loops_page_run, METH_VARARGS, NULL},
    {"frame_run", loops_frame_run, METH_VARARGS, NULL},
    {"pack", loops_pack, METH_VARARGS, NULL},
    {"unpack", loops_unpack, METH_VARARGS, NULL},
    {"first_difference", loops_first_difference, METH_VARARGS, NULL},
    {"xor", loops_xor, METH_VARARGS, NULL},
    {"mask", loops_mask, METH_VARARGS, NULL},
    {"tally", loops_tally, METH_VARARGS, NULL},
    {"rows", loops_rows, METH_VARARGS, NULL},
    {"ram_records", loops_ram_records, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "mtetool._loops", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__loops(void)
{
    return PyModule_Create(&definition);
}

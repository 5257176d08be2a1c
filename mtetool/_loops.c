/* The inner loops over tags, in C: one function for each of mtetool/loops_numpy.py, which says
 * what they do and is what they are tested against. No policy and no format is decided here.
 *
 * Tags are one byte a granule. Every function bears any bytes whatever and any lengths: the
 * callers' mistakes and hostile snapshots end in ValueError. The GIL is released.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the loops over words take the lowest address for the lowest byte"
#endif

static inline uint64_t
word(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* A bit for each of the eight bytes that is not 0; their bits 7 must be 0. */
static inline uint64_t
nonzero_bytes(uint64_t bytes)
{
    uint64_t high = (bytes + 0x7f7f7f7f7f7f7f7f) & 0x8080808080808080;
    return (high >> 7) * 0x0102040810204080 >> 56;
}

/* A bit for each of 64 granules whose tag is not that of the granule before; n is how many. */
static inline uint64_t
boundaries(const uint8_t *tags, size_t at, size_t n)
{
    if (n < 64) {
        uint64_t mask = 0;
        for (size_t i = at == 0; i < n; i++)
            mask |= (uint64_t)(tags[at + i] != tags[at + i - 1]) << i;
        return mask;
    }
    const uint8_t *here = tags + at;
    uint64_t changes[8], any, first = word(here);
    any = changes[0] = first ^ (at ? word(here - 1) : first << 8 | (first & 0xff));
    for (int i = 1; i < 8; i++)
        any |= changes[i] = word(here + 8 * i) ^ word(here + 8 * i - 1);
    if (!any)
        return 0;
    uint64_t mask = 0;
    for (int i = 0; i < 8; i++)
        mask |= nonzero_bytes(changes[i]) << 8 * i;
    return mask;
}

static inline uint8_t *
put_long(uint8_t *out, size_t length)
{
    size_t rest = length - 256;
    for (; rest >= 128; rest >>= 7)
        *out++ = (uint8_t)(rest | 128);
    *out++ = (uint8_t)rest;
    return out;
}

/* The runs of `n` tags: lengths (0 for those above 255), then tags two a byte, then the long
 * lengths. `room` is scratch for the tags. Returns what was written, 0 if it is not n_runs. */
static size_t
write_runs(const uint8_t *tags, size_t n, uint8_t *out, uint8_t *room, size_t n_runs)
{
    uint8_t *lengths = out, *longs = out + n_runs + (n_runs + 1) / 2;
    size_t runs = 0, start = 0;
    for (size_t at = 0; at < n; at += 64) {
        uint64_t mask = boundaries(tags, at, n - at);
        if (runs + (size_t)__builtin_popcountll(mask) >= n_runs)
            return 0;
        while (mask) {
            size_t stop = at + (size_t)__builtin_ctzll(mask), length = stop - start;
            mask &= mask - 1;
            room[runs] = tags[start];
            lengths[runs++] = (uint8_t)length;
            if (__builtin_expect(length > 255, 0)) {
                lengths[runs - 1] = 0;
                longs = put_long(longs, length);
            }
            start = stop;
        }
    }
    if (runs + 1 != n_runs)
        return 0;
    size_t length = n - start;
    room[runs] = tags[start];
    lengths[runs] = length > 255 ? 0 : (uint8_t)length;
    if (length > 255)
        longs = put_long(longs, length);
    room[n_runs] = 0;
    for (size_t i = 0; i < (n_runs + 1) / 2; i++)
        out[n_runs + i] = (uint8_t)(room[2 * i] | room[2 * i + 1] << 4);
    return (size_t)(longs - out);
}

/* What write_runs wrote, back: 1, or 0 for anything that it would not have written for n tags,
 * but that neighbours may have one tag. */
static int
read_runs(const uint8_t *in, size_t size, size_t n_runs, uint8_t *tags, size_t n)
{
    const uint8_t *values = in + n_runs, *longs = values + (n_runs + 1) / 2, *end = in + size;
    size_t at = 0;
    for (size_t run = 0; run < n_runs; run++) {
        size_t length = in[run];
        uint8_t tag = values[run / 2] >> 4 * (run & 1) & 15;
        if (__builtin_expect(length == 0, 0)) {
            int shift = 0;
            uint8_t byte;
            do {
                if (longs == end || shift >= 42)
                    return 0;
                byte = *longs++;
                length |= (size_t)(byte & 127) << shift;
                shift += 7;
            } while (byte & 128);
            length += 256;
        }
        if (length > n - at)
            return 0;
        if (length <= 16 && n - at >= 16)
            memset(tags + at, tag, 16); /* what is too much, the next runs write over */
        else
            memset(tags + at, tag, length);
        at += length;
    }
    int odd_is_clear = !(n_runs & 1) || values[n_runs / 2] >> 4 == 0;
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

/* --- what Python sees --------------------------------------------------------------------- */

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
    size_t runs = 1, tagged = 0, pages = 0;
    uint8_t bits = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*n", &tags, &page))
        return NULL;
    if (page <= 0 || page % 128 || tags.len % page || tags.len == 0)
        return refuse("tags that are not whole pages", &tags, NULL);
    Py_BEGIN_ALLOW_THREADS
    const uint8_t *at = tags.buf, *end = at + tags.len;
    uint8_t before = *at;
    while (at < end) {
        size_t in_page = 0;
        for (Py_ssize_t part = 0; part < page; part += 128, at += 128) {
            uint8_t n_tagged = 0, n_changes = 0, seen = 0;
            n_changes = at[0] != before;
            for (int i = 1; i < 128; i++)
                n_changes += at[i] != at[i - 1];
            for (int i = 0; i < 128; i++) {
                n_tagged += at[i] != 0;
                seen |= at[i];
            }
            before = at[127];
            runs += n_changes;
            in_page += n_tagged;
            bits |= seen;
        }
        tagged += in_page;
        pages += in_page != 0;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&tags);
    return Py_BuildValue("nnni", (Py_ssize_t)runs, (Py_ssize_t)tagged, (Py_ssize_t)pages, bits);
}

static PyObject *
loops_to_runs(PyObject *module, PyObject *args)
{
    Py_buffer tags, out;
    Py_ssize_t n_runs;
    size_t written;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nw*", &tags, &n_runs, &out))
        return NULL;
    /* Lengths, tags, long lengths (of which there are at most n / 256, of 5 bytes), scratch. */
    if (tags.len < 64 || tags.len >> 35 || n_runs <= 0 || n_runs > tags.len / 4 ||
        out.len < tags.len)
        return refuse("too many runs for the room there is", &tags, &out);
    Py_BEGIN_ALLOW_THREADS
    uint8_t *room = (uint8_t *)out.buf + out.len - n_runs - 1;
    written = write_runs(tags.buf, (size_t)tags.len, out.buf, room, (size_t)n_runs);
    Py_END_ALLOW_THREADS
    if (!written)
        return refuse("not as many runs as announced", &tags, &out);
    PyBuffer_Release(&tags);
    PyBuffer_Release(&out);
    return PyLong_FromSize_t(written);
}

static PyObject *
loops_from_runs(PyObject *module, PyObject *args)
{
    Py_buffer data, tags;
    Py_ssize_t n_runs;
    int sound;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*nw*", &data, &n_runs, &tags))
        return NULL;
    if (n_runs < 0 || n_runs > data.len || n_runs + (n_runs + 1) / 2 > data.len)
        return refuse("fewer runs than announced", &data, &tags);
    Py_BEGIN_ALLOW_THREADS
    sound = read_runs(data.buf, (size_t)data.len, (size_t)n_runs, tags.buf, (size_t)tags.len);
    Py_END_ALLOW_THREADS
    if (!sound)
        return refuse("runs that are not those of so many granules", &data, &tags);
    PyBuffer_Release(&data);
    PyBuffer_Release(&tags);
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
    const uint8_t *restrict from = tags.buf;
    uint8_t *restrict to = out.buf;
    for (Py_ssize_t i = 0; i < out.len; i++) {
        uint16_t pair;
        memcpy(&pair, from + 2 * i, sizeof pair);
        to[i] = (uint8_t)(pair | pair >> 4);
    }
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

/* Python's view of the pager. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static PyObject *raise_pager_error(pager_object *self)
{
    int error;
    char text[PAGER_TEXT_BYTES];
    pthread_mutex_lock(&self->pager.lock);
    error = self->pager.error;
    memcpy(text, self->pager.error_text, sizeof text);
    pthread_mutex_unlock(&self->pager.lock);
    if (error == 0)
        return raise_errno(ECANCELED, "the pass was aborted");
    return raise_errno(error, text);
}

static bool pager_enter(pager_object *self)
{
    if (!self->open) {
        PyErr_SetString(PyExc_ValueError, "the pager is closed");
        return false;
    }
    self->users++;
    return true;
}

static source *parse_sources(PyObject *list, size_t *count)
{
    Py_ssize_t num = PySequence_Size(list), opened = 0;
    if (num < 0)
        return NULL;
    source *sources = calloc((size_t)(num ? num : 1), sizeof *sources);
    if (sources == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (; opened < num; opened++) {
        PyObject *path = NULL;
        int direct = 0, error = -1;
        if (parse_tuple_at(list, opened, "(path, direct)", "O&p", PyUnicode_FSConverter, &path, &direct)) {
            error = source_open(&sources[opened], PyBytes_AS_STRING(path), direct != 0);
            if (error != 0) {
                errno = error;
                PyErr_SetFromErrnoWithFilename(PyExc_OSError, PyBytes_AS_STRING(path));
            }
        }
        Py_XDECREF(path);
        if (error != 0)
            goto failed;
    }
    *count = (size_t)num;
    return sources;
failed:
    while (opened-- > 0)
        source_close(&sources[opened]);
    free(sources);
    return NULL;
}

static block *parse_blocks(PyObject *list, size_t *count)
{
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    block *blocks = calloc((size_t)(num ? num : 1), sizeof *blocks);
    if (blocks == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < num; i++) {
        uint32_t source_number, kind;
        uint64_t offset, bytes, home;
        if (!parse_tuple_at(list, i, "(source, kind, offset, bytes, home)", "O&O&O&O&O&", to_uint32, &source_number,
                            to_uint32, &kind, to_uint64, &offset, to_uint64, &bytes, to_uint64, &home)) {
            free(blocks);
            return NULL;
        }
        blocks[i] = (block){.source = source_number, .kind = (block_kind)kind, .offset = offset, .bytes = bytes,
                            .home = (uint8_t *)(uintptr_t)home};
    }
    *count = (size_t)num;
    return blocks;
}

static use *parse_order(PyObject *list, size_t *count)
{
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    use *uses = calloc((size_t)(num ? num : 1), sizeof *uses);
    if (uses == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *item = PySequence_GetItem(list, i);
        bool parsed = item != NULL && to_uint32(item, &uses[i].block);
        Py_XDECREF(item);
        if (!parsed) {
            free(uses);
            return NULL;
        }
    }
    *count = (size_t)num;
    return uses;
}

static PyObject *pager_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sources", "blocks", "order", "ring", "chunk_bytes", "threads", "experts", NULL};
    PyObject *source_list, *block_list, *order_list, *ring, *experts = Py_None;
    Py_ssize_t chunk_bytes = 1 << 20, threads = 3;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|nnO", names, &source_list, &block_list, &order_list, &ring,
                                     &chunk_bytes, &threads, &experts))
        return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (ring != Py_None && !PyObject_TypeCheck(ring, state->arena_type))
        return PyErr_Format(PyExc_TypeError, "expected ring to be an Arena or None, got %s", Py_TYPE(ring)->tp_name);
    if (chunk_bytes <= 0 || threads <= 0 || threads > 256)
        return PyErr_Format(PyExc_ValueError, "expected chunk_bytes > 0 and 1 to 256 threads, got %zd and %zd",
                            chunk_bytes, threads);
    pager_object *self = (pager_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    size_t num_sources = 0, num_blocks = 0, num_uses = 0;
    block *blocks = NULL;
    use *uses = NULL;
    source *sources = parse_sources(source_list, &num_sources);
    if (sources != NULL)
        blocks = parse_blocks(block_list, &num_blocks);
    if (blocks != NULL)
        uses = parse_order(order_list, &num_uses);
    if (uses == NULL) {
        for (size_t i = 0; i < num_sources; i++)
            source_close(&sources[i]);
        free(sources);
        free(blocks);
        Py_DECREF(self);
        return NULL;
    }
    arena_object *arena = ring == Py_None ? NULL : (arena_object *)ring;
    int error = pager_init(&self->pager, sources, num_sources, blocks, num_blocks, uses, num_uses,
                           arena ? arena->memory : NULL, arena ? (size_t)arena->bytes : 0, (size_t)chunk_bytes);
    self->open = true;
    self->ring = ring;
    self->experts = experts;
    Py_INCREF(ring);
    Py_INCREF(experts);
    if (error == 0 && experts != Py_None && !give_experts(&self->pager, experts))
        error = EINVAL;
    else if (error != 0)
        raise_errno(error, self->pager.error_text);
    else if ((error = pager_start(&self->pager, (size_t)threads)) != 0)
        raise_errno(error, "the reading threads could not be started");
    if (error != 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void pager_shut(pager_object *self)
{
    if (!self->open)
        return;
    self->open = false;
    Py_BEGIN_ALLOW_THREADS
    pager_destroy(&self->pager);
    Py_END_ALLOW_THREADS
    Py_CLEAR(self->ring);
    Py_CLEAR(self->experts);
}

static void pager_dealloc(PyObject *object)
{
    pager_shut((pager_object *)object);
    Py_CLEAR(((pager_object *)object)->ring);
    Py_CLEAR(((pager_object *)object)->experts);
    free_heap_object(object);
}

static PyObject *py_pager_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    if (self->users > 0)
        return PyErr_Format(PyExc_RuntimeError, "the pager is in use by %d calls or hooks", self->users);
    pager_shut(self);
    Py_RETURN_NONE;
}

#define PAGER_CALL(self, statement)        \
    do {                                   \
        if (!pager_enter(self))            \
            return NULL;                   \
        Py_BEGIN_ALLOW_THREADS             \
        statement;                         \
        Py_END_ALLOW_THREADS               \
        (self)->users--;                   \
    } while (0)

static PyObject *py_pager_begin_pass(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    bool good;
    PAGER_CALL(self, good = pager_begin_pass(&self->pager));
    if (!good)
        return raise_pager_error(self);
    Py_RETURN_NONE;
}

static PyObject *py_pager_end_pass(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    bool good;
    PAGER_CALL(self, good = pager_end_pass(&self->pager));
    if (!good)
        return raise_pager_error(self);
    Py_RETURN_NONE;
}

static PyObject *py_pager_acquire(PyObject *object, PyObject *argument)
{
    pager_object *self = (pager_object *)object;
    uint32_t number;
    if (!to_uint32(argument, &number))
        return NULL;
    uint8_t *address = NULL;
    bool good, next_ready;
    PAGER_CALL(self, good = number < self->pager.num_blocks &&
                            pager_acquire(&self->pager, number, &address, &next_ready));
    if (number >= self->pager.num_blocks)
        return PyErr_Format(PyExc_IndexError, "expected a block below %zu, got %u", self->pager.num_blocks, number);
    if (!good)
        return raise_pager_error(self);
    return PyLong_FromVoidPtr(address);
}

static PyObject *py_pager_release(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    PAGER_CALL(self, pager_release(&self->pager));
    Py_RETURN_NONE;
}

static PyObject *py_pager_abort(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    PAGER_CALL(self, pager_abort(&self->pager));
    Py_RETURN_NONE;
}

static bool is_rows_block(pager_object *self, uint32_t number)
{
    return number < self->pager.num_blocks && self->pager.blocks[number].kind == BLOCK_ROWS;
}

static PyObject *py_pager_open_rows(PyObject *object, PyObject *args)
{
    pager_object *self = (pager_object *)object;
    uint32_t number;
    Py_ssize_t row_bytes;
    Py_buffer rows;
    int error = 0;
    if (!PyArg_ParseTuple(args, "O&ny*", to_uint32, &number, &row_bytes, &rows))
        return NULL;
    if (!pager_enter(self)) {
        PyBuffer_Release(&rows);
        return NULL;
    }
    if (!is_rows_block(self, number) || row_bytes <= 0 || rows.len % (Py_ssize_t)sizeof(int32_t) != 0) {
        PyErr_Format(PyExc_ValueError, "expected a table of rows, bytes of a row and int32 rows, got block %u, %zd and "
                     "%zd bytes", number, row_bytes, rows.len);
    } else {
        Py_BEGIN_ALLOW_THREADS
        error = pager_open_rows(&self->pager, number, (size_t)row_bytes, rows.buf,
                                (size_t)rows.len / sizeof(int32_t));
        Py_END_ALLOW_THREADS
    }
    self->users--;
    PyBuffer_Release(&rows);
    if (error != 0)
        raise_pager_error(self);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_pager_close_rows(PyObject *object, PyObject *argument)
{
    pager_object *self = (pager_object *)object;
    uint32_t number;
    if (!to_uint32(argument, &number))
        return NULL;
    if (self->open && !is_rows_block(self, number))
        return PyErr_Format(PyExc_ValueError, "block %u is not a table of rows", number);
    PAGER_CALL(self, pager_close_rows(&self->pager, number));
    Py_RETURN_NONE;
}

static PyObject *py_pager_statistics(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    pager_statistics s;
    PAGER_CALL(self, pager_copy_statistics(&self->pager, &s));
    bool direct = self->pager.num_sources > 0;
    for (size_t i = 0; i < self->pager.num_sources; i++)
        direct = direct && atomic_load(&self->pager.sources[i].direct);
    return Py_BuildValue("{sdsKsKsKsdsKsdsKsKsKsO}", "pass_fraction", s.pass_fraction, "read_bytes", s.read_bytes,
                         "resident_bytes", s.resident_bytes, "row_bytes", s.row_bytes, "wait_seconds", (double)s.wait_ns * 1e-9, "waits", s.waits,
                         "busy_seconds", (double)s.busy_ns * 1e-9, "passes", s.passes, "ring_wraps", s.ring_wraps,
                         "reorders", s.reorders, "direct", direct ? Py_True : Py_False);
}

static PyObject *py_pager_expert_statistics(PyObject *object, PyObject *unused)
{
    (void)unused;
    pager_object *self = (pager_object *)object;
    if (self->open && self->pager.experts != NULL)
        return describe_expert_statistics(&self->pager);
    return PyDict_New();
}

static PyMethodDef pager_methods[] = {
    {"begin_pass", py_pager_begin_pass, METH_NOARGS, "Start a pass at the first use. OSError when failed before."},
    {"end_pass", py_pager_end_pass, METH_NOARGS, "End a pass. OSError when what it read may be wrong."},
    {"acquire", py_pager_acquire, METH_O, "Wait for a block's next use; its address until release()."},
    {"release", py_pager_release, METH_NOARGS, "Give back everything acquired."},
    {"abort", py_pager_abort, METH_NOARGS, "End waits now; passes fail until begin_pass()."},
    {"open_rows", py_pager_open_rows, METH_VARARGS, "open_rows(block, row_bytes, int32 buffer): bring rows home."},
    {"close_rows", py_pager_close_rows, METH_O, "Drop a table's rows."},
    {"statistics", py_pager_statistics, METH_NOARGS, "Counters since the start."},
    {"expert_statistics", py_pager_expert_statistics, METH_NOARGS, "Counters of the cache of experts; {} without one."},
    {"close", py_pager_close, METH_NOARGS, "Stop the reading threads and close the files."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot pager_slots[] = {
    {Py_tp_doc, "Pager(sources, blocks, order, ring, chunk_bytes=1 MiB, threads=3): blocks of files, in order, ahead.\n\n"
                "sources: (path, direct) pairs; blocks: (source, kind, offset, bytes, home address) with kind 0 resident,\n"
                "1 streamed, 2 rows; order: block numbers, one pass; ring: Arena or None. See pager.h."},
    {Py_tp_new, pager_new},
    {Py_tp_dealloc, pager_dealloc},
    {Py_tp_methods, pager_methods},
    {0, NULL},
};

PyType_Spec pager_spec = {"edgeinfer._native.Pager", sizeof(pager_object), 0, Py_TPFLAGS_DEFAULT, pager_slots};

/* Python bindings: edgeinfer._native. Everything else in this folder knows nothing of Python. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "hook.h"
#include "intercept.h"
#include "memory.h"
#include "pager.h"

typedef struct {
    PyTypeObject *arena_type;
    PyTypeObject *pager_type;
} module_state;

static PyObject *raise_errno(int error, const char *text)
{
    PyObject *arguments = Py_BuildValue("(is)", error, text);
    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

/* Converters for "O&". The formats "I" and "K" take a number modulo 2^32 or 2^64 without a word. */
static int to_uint64(PyObject *value, void *to)
{
    PyObject *number = PyNumber_Index(value);
    if (number == NULL)
        return 0;
    *(uint64_t *)to = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return !PyErr_Occurred();
}

static int to_uint32(PyObject *value, void *to)
{
    uint64_t number;
    if (!to_uint64(value, &number))
        return 0;
    if (number > UINT32_MAX) {
        PyErr_Format(PyExc_OverflowError, "expected a number below 2**32, got %R", value);
        return 0;
    }
    *(uint32_t *)to = (uint32_t)number;
    return 1;
}

/* Reads element `index` of a sequence, a tuple that `names` describes. */
static bool parse_tuple_at(PyObject *list, Py_ssize_t index, const char *names, const char *format, ...)
{
    PyObject *item = PySequence_GetItem(list, index);
    if (item == NULL)
        return false;
    bool good = PyTuple_Check(item);
    if (good) {
        va_list to;
        va_start(to, format);
        good = PyArg_VaParse(item, format, to);
        va_end(to);
    } else {
        PyErr_Format(PyExc_TypeError, "expected a tuple %s, got %s", names, Py_TYPE(item)->tp_name);
    }
    Py_DECREF(item);
    return good;
}

static void free_heap_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Arena: anonymous memory behind the buffer protocol ------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    void *memory;
    Py_ssize_t bytes;
} arena_object;

static PyObject *arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nbytes", NULL};
    Py_ssize_t bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", names, &bytes))
        return NULL;
    if (bytes <= 0)
        return PyErr_Format(PyExc_ValueError, "expected a positive number of bytes, got %zd", bytes);
    arena_object *self = (arena_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->memory = memory_allocate((size_t)bytes);
    self->bytes = bytes;
    if (self->memory == NULL) {
        int error = errno;
        Py_DECREF(self);
        return raise_errno(error, "memory could not be reserved");
    }
    return (PyObject *)self;
}

static void arena_dealloc(PyObject *object)
{
    arena_object *self = (arena_object *)object;
    memory_free(self->memory, (size_t)self->bytes);
    free_heap_object(object);
}

/* Every view holds a reference to the arena, so the memory outlives it. */
static int arena_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    arena_object *self = (arena_object *)object;
    return PyBuffer_FillInfo(view, object, self->memory, self->bytes, 0, flags);
}

static PyObject *arena_address(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(((arena_object *)object)->memory);
}

static PyGetSetDef arena_getset[] = {
    {"address", arena_address, NULL, "Address of the first byte.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot arena_slots[] = {
    {Py_tp_doc, "Arena(nbytes): page-aligned anonymous memory, on huge pages where the system has them.\n\n"
                "Supports the buffer protocol; views keep the memory alive."},
    {Py_tp_new, arena_new},
    {Py_tp_dealloc, arena_dealloc},
    {Py_tp_getset, arena_getset},
    {Py_bf_getbuffer, arena_getbuffer},
    {0, NULL},
};

static PyType_Spec arena_spec = {"edgeinfer._native.Arena", sizeof(arena_object), 0, Py_TPFLAGS_DEFAULT, arena_slots};

/* ---- Pager --------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    pager pager;
    PyObject *ring;
    bool open;
    int users; /* calls under way without the GIL, and hooks that are bound */
} pager_object;

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
    static char *names[] = {"sources", "blocks", "order", "ring", "chunk_bytes", "threads", NULL};
    PyObject *source_list, *block_list, *order_list, *ring;
    Py_ssize_t chunk_bytes = 1 << 20, threads = 3;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|nn", names, &source_list, &block_list, &order_list, &ring,
                                     &chunk_bytes, &threads))
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
    Py_INCREF(ring);
    if (error != 0)
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
}

static void pager_dealloc(PyObject *object)
{
    pager_shut((pager_object *)object);
    Py_CLEAR(((pager_object *)object)->ring);
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
    return Py_BuildValue("{sdsKsKsKsdsKsdsKsKsKsO}", "pass_fraction", s.pass_fraction, "read_bytes", s.read_bytes, "resident_bytes", s.resident_bytes,
                         "row_bytes", s.row_bytes, "wait_seconds", (double)s.wait_ns * 1e-9, "waits", s.waits,
                         "busy_seconds", (double)s.busy_ns * 1e-9, "passes", s.passes, "ring_wraps", s.ring_wraps,
                         "reorders", s.reorders, "direct", direct ? Py_True : Py_False);
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

static PyType_Spec pager_spec = {"edgeinfer._native.Pager", sizeof(pager_object), 0, Py_TPFLAGS_DEFAULT, pager_slots};

/* ---- Hook ---------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    hook hook;
    PyObject *pager; /* kept alive and open while bound */
} hook_object;

static bool take_function(PyObject *functions, const char *name, void *to)
{
    PyObject *value = PyDict_GetItemString(functions, name);
    if (value == NULL) {
        PyErr_Format(PyExc_KeyError, "expected the address of %s", name);
        return false;
    }
    void *address = PyLong_AsVoidPtr(value);
    if (PyErr_Occurred())
        return false;
    Dl_info where;
    if (dladdr(address, &where) == 0) {
        PyErr_Format(PyExc_ValueError, "expected the address of %s, got %R, which lies in no loaded library", name, value);
        return false;
    }
    memcpy(to, &address, sizeof address);
    return true;
}

static PyObject *hook_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"functions", NULL};
    PyObject *functions;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!", names, &PyDict_Type, &functions))
        return NULL;
    ggml_functions ggml;
    if (!take_function(functions, "ggml_init", &ggml.init) || !take_function(functions, "ggml_free", &ggml.free) ||
        !take_function(functions, "ggml_new_tensor_1d", &ggml.new_tensor_1d) ||
        !take_function(functions, "ggml_new_tensor_2d", &ggml.new_tensor_2d) ||
        !take_function(functions, "ggml_new_tensor_3d", &ggml.new_tensor_3d) ||
        !take_function(functions, "ggml_mul_mat_id", &ggml.mul_mat_id) ||
        !take_function(functions, "ggml_get_rows", &ggml.get_rows) ||
        !take_function(functions, "ggml_view_1d", &ggml.view_1d) ||
        !take_function(functions, "ggml_reshape_1d", &ggml.reshape_1d) ||
        !take_function(functions, "ggml_permute", &ggml.permute) ||
        !take_function(functions, "ggml_transpose", &ggml.transpose) ||
        !take_function(functions, "ggml_op_name", &ggml.op_name) ||
        !take_function(functions, "ggml_set_name", &ggml.set_name) ||
        !take_function(functions, "ggml_set_input", &ggml.set_input) ||
        !take_function(functions, "ggml_tensor_overhead", &ggml.tensor_overhead))
        return NULL;
    hook_object *self = (hook_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    atomic_init(&self->hook.interrupted, false);
    const char *difference = ggml_view_check(&ggml, &self->hook.operations);
    if (difference != NULL) {
        Py_DECREF(self);
        return PyErr_Format(PyExc_RuntimeError, "llama.cpp's tensors differ from what is known here: %s", difference);
    }
    return (PyObject *)self;
}

/* A bound pager counts the hook among its users, so that it cannot be closed under a pass. */
static void hook_exchange_pager(hook_object *self, pager_object *bound)
{
    PyObject *before = self->pager;
    self->pager = (PyObject *)bound;
    if (bound != NULL) {
        bound->users++;
        Py_INCREF(bound);
    }
    if (before != NULL)
        ((pager_object *)before)->users--;
    Py_XDECREF(before);
}

static void hook_dealloc(PyObject *object)
{
    hook_object *self = (hook_object *)object;
    hook_clear(&self->hook);
    hook_exchange_pager(self, NULL);
    free_heap_object(object);
}

static PyObject *py_hook_evaluate_address(PyObject *object, void *closure)
{
    (void)object, (void)closure;
    return PyLong_FromSize_t((size_t)(uintptr_t)hook_evaluate);
}

static PyObject *py_hook_abort_address(PyObject *object, void *closure)
{
    (void)object, (void)closure;
    return PyLong_FromSize_t((size_t)(uintptr_t)hook_should_abort);
}

static PyObject *py_hook_data_address(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromVoidPtr(&((hook_object *)object)->hook);
}

static PyObject *py_hook_halted(PyObject *object, void *closure)
{
    (void)closure;
    return PyBool_FromLong(hook_should_abort(&((hook_object *)object)->hook));
}

static PyObject *py_hook_set_ranges(PyObject *object, PyObject *list)
{
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    hook_range *ranges = PyMem_Calloc((size_t)num + 1, sizeof *ranges);
    if (ranges == NULL)
        return PyErr_NoMemory();
    int error = 0;
    for (Py_ssize_t i = 0; i < num && !PyErr_Occurred(); i++) {
        uint64_t start, end;
        if (parse_tuple_at(list, i, "(start, end)", "O&O&", to_uint64, &start, to_uint64, &end))
            ranges[i] = (hook_range){(uintptr_t)start, (uintptr_t)end};
    }
    if (!PyErr_Occurred())
        error = hook_set_ranges(&((hook_object *)object)->hook, ranges, (size_t)num);
    PyMem_Free(ranges);
    if (PyErr_Occurred())
        return NULL;
    if (error != 0)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_hook_record(PyObject *object, PyObject *argument)
{
    int on = PyObject_IsTrue(argument);
    if (on < 0)
        return NULL;
    ((hook_object *)object)->hook.recording = on != 0;
    Py_RETURN_NONE;
}

static PyObject *py_hook_records(PyObject *object, PyObject *unused)
{
    (void)unused;
    hook *h = &((hook_object *)object)->hook;
    if (h->out_of_memory)
        return PyErr_NoMemory();
    PyObject *list = PyList_New((Py_ssize_t)h->num_records);
    for (size_t i = 0; list != NULL && i < h->num_records; i++) {
        hook_record *r = &h->records[i];
        PyObject *item = Py_BuildValue("(KKsIIOO)", (unsigned long long)(uintptr_t)r->tensor,
                                       (unsigned long long)(uintptr_t)r->data, r->name, r->recording, r->node,
                                       r->op == h->operations.get_rows ? Py_True : Py_False,
                                       r->through_view ? Py_True : Py_False);
        if (item == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

static PyObject *py_hook_bind(PyObject *object, PyObject *args)
{
    hook_object *self = (hook_object *)object;
    module_state *state = PyType_GetModuleState(Py_TYPE(object));
    PyObject *pager_argument, *list;
    if (!PyArg_ParseTuple(args, "O!O", state->pager_type, &pager_argument, &list))
        return NULL;
    pager_object *bound = (pager_object *)pager_argument;
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    hook_weight *weights = PyMem_Calloc((size_t)num + 1, sizeof *weights);
    if (weights == NULL)
        return PyErr_NoMemory();
    int error = 0;
    for (Py_ssize_t i = 0; i < num && bound->open && !PyErr_Occurred(); i++) {
        uint64_t tensor, home;
        long number;
        int streamed, rows;
        if (parse_tuple_at(list, i, "(tensor, home, block, streamed, rows)", "O&O&lpp", to_uint64, &tensor, to_uint64,
                           &home, &number, &streamed, &rows)) {
            if (number >= (long)bound->pager.num_blocks)
                PyErr_Format(PyExc_IndexError, "expected a block below %zu, got %ld", bound->pager.num_blocks, number);
            weights[i] = (hook_weight){.tensor = (ggml_view *)(uintptr_t)tensor, .home = (void *)(uintptr_t)home,
                                       .block = number < 0 ? 0 : (uint32_t)number, .has_block = number >= 0,
                                       .streamed = streamed != 0, .rows = rows != 0};
        }
    }
    if (!PyErr_Occurred() && !bound->open)
        PyErr_SetString(PyExc_ValueError, "the pager is closed");
    if (!PyErr_Occurred())
        error = hook_bind(&self->hook, &bound->pager, weights, (size_t)num);
    PyMem_Free(weights);
    if (PyErr_Occurred())
        return NULL;
    if (error != 0)
        return PyErr_NoMemory();
    hook_exchange_pager(self, bound);
    Py_RETURN_NONE;
}

static PyObject *py_hook_unbind(PyObject *object, PyObject *unused)
{
    (void)unused;
    ((hook_object *)object)->hook.pager = NULL;
    hook_exchange_pager((hook_object *)object, NULL);
    Py_RETURN_NONE;
}

static PyObject *py_hook_begin_pass(PyObject *object, PyObject *unused)
{
    (void)unused;
    hook_begin_pass(&((hook_object *)object)->hook);
    Py_RETURN_NONE;
}

static PyObject *py_hook_end_pass(PyObject *object, PyObject *unused)
{
    (void)unused;
    hook_end_pass(&((hook_object *)object)->hook);
    Py_RETURN_NONE;
}

static PyObject *py_hook_interrupt(PyObject *object, PyObject *argument)
{
    int on = PyObject_IsTrue(argument);
    if (on < 0)
        return NULL;
    atomic_store(&((hook_object *)object)->hook.interrupted, on != 0);
    Py_RETURN_NONE;
}

static PyMethodDef hook_methods[] = {
    {"set_ranges", py_hook_set_ranges, METH_O, "Addresses (start, end) of the model file's mapping."},
    {"record", py_hook_record, METH_O, "Record the uses of weights instead of computing."},
    {"records", py_hook_records, METH_NOARGS,
     "(tensor, data, name, recording, node, rows, through a view) for each use seen, in order."},
    {"bind", py_hook_bind, METH_VARARGS,
     "bind(pager, weights): (tensor, home, block or -1, streamed, rows) for each weight."},
    {"unbind", py_hook_unbind, METH_NOARGS, "Forget the pager."},
    {"begin_pass", py_hook_begin_pass, METH_NOARGS, "Before llama_decode."},
    {"end_pass", py_hook_end_pass, METH_NOARGS, "After llama_decode, however it ended."},
    {"interrupt", py_hook_interrupt, METH_O, "True makes the abort callback end the pass; False clears it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef hook_getset[] = {
    {"evaluate_address", py_hook_evaluate_address, NULL, "For llama_context_params.cb_eval.", NULL},
    {"abort_address", py_hook_abort_address, NULL, "For llama_context_params.abort_callback.", NULL},
    {"data_address", py_hook_data_address, NULL, "User data of both.", NULL},
    {"halted", py_hook_halted, NULL, "Whether the pass is to end or has failed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot hook_slots[] = {
    {Py_tp_doc, "Hook(functions): the graph hook of one llama.cpp context; functions: name -> address, of ggml.\n\n"
                "RuntimeError where the loaded ggml lays out its tensors differently. See hook.h."},
    {Py_tp_new, hook_new},
    {Py_tp_dealloc, hook_dealloc},
    {Py_tp_methods, hook_methods},
    {Py_tp_getset, hook_getset},
    {0, NULL},
};

static PyType_Spec hook_spec = {"edgeinfer._native.Hook", sizeof(hook_object), 0, Py_TPFLAGS_DEFAULT, hook_slots};

/* ---- functions ----------------------------------------------------------------------------------------------- */

/* load_without_reading(library, [(device, inode, bytes)], function): calls function() while mmap calls of the library
   for these files give reservations. Returns (result, [address or None]). */
static PyObject *load_without_reading(PyObject *module, PyObject *args)
{
    (void)module;
    const char *library;
    PyObject *list, *function;
    if (!PyArg_ParseTuple(args, "sOO", &library, &list, &function))
        return NULL;
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    intercepted_file *files = PyMem_Calloc((size_t)num + 1, sizeof *files);
    if (files == NULL)
        return PyErr_NoMemory();
    PyObject *result = NULL, *addresses = NULL, *answer = NULL;
    for (Py_ssize_t i = 0; i < num; i++) {
        uint64_t device, inode, bytes;
        if (!parse_tuple_at(list, i, "(device, inode, bytes)", "O&O&O&", to_uint64, &device, to_uint64, &inode, to_uint64,
                            &bytes))
            goto done;
        files[i] = (intercepted_file){.device = (dev_t)device, .inode = (ino_t)inode, .bytes = (size_t)bytes};
    }
    bool active;
    Py_BEGIN_ALLOW_THREADS
    active = intercept_begin(library, files, (size_t)num);
    Py_END_ALLOW_THREADS
    result = PyObject_CallNoArgs(function);
    if (active)
        intercept_end();
    if (result == NULL)
        goto done;
    addresses = PyList_New(num);
    for (Py_ssize_t i = 0; addresses != NULL && i < num; i++) {
        PyObject *address = files[i].address ? PyLong_FromVoidPtr(files[i].address) : Py_NewRef(Py_None);
        if (address == NULL)
            goto done;
        PyList_SET_ITEM(addresses, i, address);
    }
    if (addresses != NULL)
        answer = PyTuple_Pack(2, result, addresses);
done:
    Py_XDECREF(result);
    Py_XDECREF(addresses);
    PyMem_Free(files);
    return answer;
}

static PyObject *pages_call(PyObject *args, int (*call)(void *, size_t), const char *what)
{
    uint64_t address, bytes;
    if (!PyArg_ParseTuple(args, "O&O&", to_uint64, &address, to_uint64, &bytes))
        return NULL;
    if (call((void *)(uintptr_t)address, (size_t)bytes) != 0)
        return raise_errno(errno, what);
    Py_RETURN_NONE;
}

static PyObject *guard_pages(PyObject *module, PyObject *args)
{
    (void)module;
    return pages_call(args, memory_guard, "pages could not be guarded");
}

static PyObject *open_pages(PyObject *module, PyObject *args)
{
    (void)module;
    return pages_call(args, memory_open, "pages could not be opened");
}

static PyMethodDef functions[] = {
    {"load_without_reading", load_without_reading, METH_VARARGS,
     "load_without_reading(library, [(device, inode, bytes)], function) -> (result, [address or None])"},
    {"guard_pages", guard_pages, METH_VARARGS, "guard_pages(address, bytes): whole pages become untouchable."},
    {"open_pages", open_pages, METH_VARARGS, "open_pages(address, bytes): the pages become readable and writable."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    state->arena_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &arena_spec, NULL);
    state->pager_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &pager_spec, NULL);
    PyObject *hook_type = PyType_FromModuleAndSpec(module, &hook_spec, NULL);
    int failed = state->arena_type == NULL || state->pager_type == NULL || hook_type == NULL ||
                 PyModule_AddType(module, state->arena_type) < 0 || PyModule_AddType(module, state->pager_type) < 0 ||
                 PyModule_AddType(module, (PyTypeObject *)hook_type) < 0 ||
                 PyModule_AddIntConstant(module, "PAGE_BYTES", (long)memory_page_bytes()) < 0;
    Py_XDECREF(hook_type);
    return failed ? -1 : 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->arena_type);
    Py_VISIT(state->pager_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->arena_type);
    Py_CLEAR(state->pager_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "edgeinfer._native",
    .m_doc = "Memory, reads and waits: the mechanism under edgeinfer. Private.",
    .m_size = sizeof(module_state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }

/* Python bindings: edgeinfer._native. The files module*.c know Python; everything else in this folder does not. */
#include "module.h"

#include <errno.h>

#include "intercept.h"
#include "memory.h"
#include "moving.h"

PyObject *raise_errno(int error, const char *text)
{
    PyObject *arguments = Py_BuildValue("(is)", error, text);
    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

int to_uint64(PyObject *value, void *to)
{
    PyObject *number = PyNumber_Index(value);
    if (number == NULL)
        return 0;
    *(uint64_t *)to = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return !PyErr_Occurred();
}

int to_uint32(PyObject *value, void *to)
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

bool parse_tuple_at(PyObject *list, Py_ssize_t index, const char *names, const char *format, ...)
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

void free_heap_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Arena: anonymous memory behind the buffer protocol ------------------------------------------------------ */

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

static PyObject *move_pages(PyObject *module, PyObject *args)
{
    (void)module;
    uint64_t from, to, bytes;
    int guard;
    if (!PyArg_ParseTuple(args, "O&O&O&p", to_uint64, &from, to_uint64, &to, to_uint64, &bytes, &guard))
        return NULL;
    if (pages_move((void *)(uintptr_t)from, (void *)(uintptr_t)to, (size_t)bytes, guard != 0) != 0)
        return raise_errno(errno, "pages could not be moved");
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"load_without_reading", load_without_reading, METH_VARARGS,
     "load_without_reading(library, [(device, inode, bytes)], function) -> (result, [address or None])"},
    {"guard_pages", guard_pages, METH_VARARGS, "guard_pages(address, bytes): whole pages become untouchable."},
    {"open_pages", open_pages, METH_VARARGS, "open_pages(address, bytes): the pages become readable and writable."},
    {"move_pages", move_pages, METH_VARARGS,
     "move_pages(from, to, bytes, guard): whole pages change their address; `from` cannot be touched then, or reads as 0."},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    state->arena_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &arena_spec, NULL);
    state->pager_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &pager_spec, NULL);
    PyObject *hook_type = PyType_FromModuleAndSpec(module, &hook_spec, NULL);
    PyObject *policy_type = PyType_FromModuleAndSpec(module, &policy_spec, NULL);
    int failed = state->arena_type == NULL || state->pager_type == NULL || hook_type == NULL || policy_type == NULL ||
                 PyModule_AddType(module, state->arena_type) < 0 || PyModule_AddType(module, state->pager_type) < 0 ||
                 PyModule_AddType(module, (PyTypeObject *)hook_type) < 0 ||
                 PyModule_AddType(module, (PyTypeObject *)policy_type) < 0 ||
                 PyModule_AddIntConstant(module, "PAGE_BYTES", (long)memory_page_bytes()) < 0;
    Py_XDECREF(hook_type);
    Py_XDECREF(policy_type);
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

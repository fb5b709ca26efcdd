/* What the files of the Python bindings share. */
#ifndef EDGEINFER_MODULE_H
#define EDGEINFER_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "pager.h"

typedef struct {
    PyTypeObject *arena_type;
    PyTypeObject *pager_type;
} module_state;

/* Arena: anonymous memory behind the buffer protocol. */
typedef struct {
    PyObject_HEAD
    void *memory;
    Py_ssize_t bytes;
} arena_object;

typedef struct {
    PyObject_HEAD
    pager pager;
    PyObject *ring, *experts; /* kept alive: their memory is used */
    bool open;
    int users; /* calls under way without the GIL, and hooks that are bound */
} pager_object;

extern PyType_Spec pager_spec, hook_spec, policy_spec;

/* Raises OSError(error, text); gives NULL. */
PyObject *raise_errno(int error, const char *text);

/* Converters for "O&". The formats "I" and "K" take a number modulo 2^32 or 2^64 without a word. */
int to_uint64(PyObject *value, void *to);
int to_uint32(PyObject *value, void *to);

/* Reads element `index` of a sequence, a tuple that `names` describes. */
bool parse_tuple_at(PyObject *list, Py_ssize_t index, const char *names, const char *format, ...);

/* Makes the cache of experts that a tuple (experts, policy, kinds, layers) describes: kinds are (slots, [(bytes, stride,
   arena)]), layers (kind, [(source, offset)]), matrices in their order of use. false with an exception. */
bool give_experts(pager *p, PyObject *description);
PyObject *describe_expert_statistics(pager *p);

/* The end of every tp_dealloc of a heap type. */
void free_heap_object(PyObject *self);

#endif

/* Python's view of the replacement policies, and the replay of a whole trace without Python. */
#include "module.h"

#include <errno.h>
#include <string.h>

#include "policy.h"

typedef struct {
    PyObject_HEAD
    policy *policy;
    uint32_t num_keys, num_slots, num_cached;
    bool *cached;
    uint64_t *in_use; /* for each key: the round in which it may not go */
    uint64_t round;
    bool busy; /* a replay is under way without the GIL */
} policy_object;

/* A one-dimensional buffer of `item_bytes` numbers of one of the struct formats in `formats`. */
static bool get_array(PyObject *object, Py_buffer *view, int flags, Py_ssize_t item_bytes, const char *formats,
                      const char *expected)
{
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT | PyBUF_ND) != 0)
        return false;
    if (view->ndim == 1 && view->itemsize == item_bytes && view->format != NULL && view->format[0] != '\0' &&
        view->format[1] == '\0' && strchr(formats, view->format[0]) != NULL)
        return true;
    PyErr_Format(PyExc_TypeError, "expected one-dimensional %s, got %d dimensions of format %s", expected, view->ndim,
                 view->format != NULL ? view->format : "B");
    PyBuffer_Release(view);
    return false;
}

static bool has_length(const Py_buffer *view, uint32_t length, const char *what)
{
    if (view->shape[0] == (Py_ssize_t)length)
        return true;
    PyErr_Format(PyExc_ValueError, "expected %s of %u keys, got %zd", what, length, view->shape[0]);
    return false;
}

static bool is_known(const char *name)
{
    for (const char *const *known = policy_names(); *known != NULL; known++)
        if (strcmp(*known, name) == 0)
            return true;
    return false;
}

static bool policy_start(policy_object *self, const char *name, policy_options *options, PyObject *layers,
                         PyObject *costs)
{
    Py_buffer layer_view = {0}, cost_view = {0};
    bool started = false;
    if (layers != Py_None) {
        if (!get_array(layers, &layer_view, PyBUF_SIMPLE, 4, "iIlL", "layers as int32") ||
            !has_length(&layer_view, self->num_keys, "the layers"))
            goto done;
        options->layer = layer_view.buf;
        for (uint32_t key = 0; key < self->num_keys; key++) {
            if (options->layer[key] > INT32_MAX) {
                PyErr_SetString(PyExc_ValueError, "expected layers from 0");
                goto done;
            }
            if (options->layer[key] >= options->num_layers)
                options->num_layers = options->layer[key] + 1;
        }
    }
    if (costs != Py_None) {
        if (!get_array(costs, &cost_view, PyBUF_SIMPLE, 4, "f", "costs as float32") ||
            !has_length(&cost_view, self->num_keys, "the costs"))
            goto done;
        options->cost = cost_view.buf;
    }
    self->policy = policy_new(name, self->num_keys, self->num_slots, options);
    if (self->policy == NULL && errno == ENOMEM)
        PyErr_NoMemory();
    else if (self->policy == NULL)
        PyErr_Format(PyExc_ValueError,
                     "the policy %s cannot be made with %u keys in %u slots and these options: expected at least one "
                     "of each, at most %u keys, layers for \"layers\", costs from 0, a half-life of at least one use, "
                     "a share from 0 to 1",
                     name, self->num_keys, self->num_slots, POLICY_MAX_KEYS);
    started = self->policy != NULL;
done:
    PyBuffer_Release(&layer_view);
    PyBuffer_Release(&cost_view);
    return started;
}

static PyObject *py_policy_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "num_keys", "num_slots", "layers", "costs", "half_life", "shallow_share", NULL};
    const char *name;
    uint32_t num_keys, num_slots;
    PyObject *layers = Py_None, *costs = Py_None;
    policy_options options = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO&O&|OOdd", names, &name, to_uint32, &num_keys, to_uint32,
                                     &num_slots, &layers, &costs, &options.half_life, &options.shallow_share))
        return NULL;
    if (!is_known(name))
        return PyErr_Format(PyExc_ValueError, "there is no policy %s", name);
    policy_object *self = (policy_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->num_keys = num_keys;
    self->num_slots = num_slots;
    if (!policy_start(self, name, &options, layers, costs)) {
        Py_DECREF(self);
        return NULL;
    }
    self->cached = PyMem_Calloc(num_keys, sizeof *self->cached);
    self->in_use = PyMem_Calloc(num_keys, sizeof *self->in_use);
    if (self->cached == NULL || self->in_use == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void policy_dealloc(PyObject *object)
{
    policy_object *self = (policy_object *)object;
    policy_free(self->policy);
    PyMem_Free(self->cached);
    PyMem_Free(self->in_use);
    free_heap_object(object);
}

static bool may_go(uint32_t key, void *data)
{
    const policy_object *self = data;
    return self->in_use[key] != self->round;
}

static bool is_idle(const policy_object *self)
{
    if (self->busy)
        PyErr_SetString(PyExc_RuntimeError, "the policy is used by another thread");
    return !self->busy;
}

static bool to_key(const policy_object *self, PyObject *value, uint32_t *key)
{
    if (!to_uint32(value, key))
        return false;
    if (*key >= self->num_keys)
        PyErr_Format(PyExc_IndexError, "expected a key below %u, got %u", self->num_keys, *key);
    return *key < self->num_keys;
}

static PyObject *py_policy_access(PyObject *object, PyObject *argument)
{
    policy_object *self = (policy_object *)object;
    uint32_t key;
    if (!to_key(self, argument, &key) || !is_idle(self))
        return NULL;
    policy_access(self->policy, key, self->cached[key]);
    return PyBool_FromLong(self->cached[key]);
}

static PyObject *py_policy_insert(PyObject *object, PyObject *argument)
{
    policy_object *self = (policy_object *)object;
    uint32_t key;
    if (!to_key(self, argument, &key) || !is_idle(self))
        return NULL;
    if (!self->cached[key] && self->num_cached == self->num_slots)
        return PyErr_Format(PyExc_ValueError, "all %u slots are taken: remove a key first", self->num_slots);
    self->num_cached += !self->cached[key];
    self->cached[key] = true;
    policy_insert(self->policy, key);
    Py_RETURN_NONE;
}

static PyObject *py_policy_remove(PyObject *object, PyObject *argument)
{
    policy_object *self = (policy_object *)object;
    uint32_t key;
    if (!to_key(self, argument, &key) || !is_idle(self))
        return NULL;
    self->num_cached -= self->cached[key];
    self->cached[key] = false;
    policy_remove(self->policy, key);
    Py_RETURN_NONE;
}

static PyObject *py_policy_victim(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pinned", NULL};
    policy_object *self = (policy_object *)object;
    PyObject *pinned = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", names, &pinned) || !is_idle(self))
        return NULL;
    self->round++;
    PyObject *iterator = pinned != NULL ? PyObject_GetIter(pinned) : NULL, *item;
    if (pinned != NULL && iterator == NULL)
        return NULL;
    while (iterator != NULL && (item = PyIter_Next(iterator)) != NULL) {
        uint32_t key;
        bool good = to_key(self, item, &key);
        Py_DECREF(item);
        if (!good)
            break;
        self->in_use[key] = self->round;
    }
    Py_XDECREF(iterator);
    if (PyErr_Occurred() || !is_idle(self))
        return NULL;
    uint32_t victim = policy_victim(self->policy, may_go, self);
    if (victim == POLICY_NONE)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(victim);
}

/* One layer's wish for `num` keys at once. False where they need more slots than there are. */
static bool replay_group(policy_object *self, const int32_t *keys, size_t num, uint8_t *marks, uint64_t *hits)
{
    self->round++;
    for (size_t i = 0; i < num; i++) {
        uint32_t key = (uint32_t)keys[i];
        policy_access(self->policy, key, self->cached[key]);
        self->in_use[key] = self->round;
        *hits += self->cached[key];
        if (marks != NULL)
            marks[i] = self->cached[key];
    }
    for (size_t i = 0; i < num; i++) {
        uint32_t key = (uint32_t)keys[i];
        if (self->cached[key])
            continue;
        if (self->num_cached == self->num_slots) {
            uint32_t victim = policy_victim(self->policy, may_go, self);
            if (victim == POLICY_NONE)
                return false;
            policy_remove(self->policy, victim);
            self->cached[victim] = false;
            self->num_cached--;
        }
        policy_insert(self->policy, key);
        self->cached[key] = true;
        self->num_cached++;
    }
    return true;
}

static bool check_replay(const policy_object *self, const Py_buffer *keys, const Py_buffer *starts)
{
    const int32_t *key = keys->buf, *start = starts->buf;
    for (Py_ssize_t i = 0; i < keys->shape[0]; i++)
        if (key[i] < 0 || (uint32_t)key[i] >= self->num_keys) {
            PyErr_Format(PyExc_ValueError, "expected keys from 0 to below %u, got %d at %zd", self->num_keys, key[i],
                         i);
            return false;
        }
    for (Py_ssize_t i = 0; i < starts->shape[0]; i++)
        if (start[i] < (i > 0 ? start[i - 1] : 0) || start[i] > keys->shape[0] || (i == 0 && start[0] != 0)) {
            PyErr_Format(PyExc_ValueError, "expected group starts that rise from 0 to at most %zd, got %d at %zd",
                         keys->shape[0], start[i], i);
            return false;
        }
    if (starts->shape[0] == 0 && keys->shape[0] > 0)
        PyErr_SetString(PyExc_ValueError, "expected group starts that rise from 0, got none");
    return !PyErr_Occurred();
}

static PyObject *py_policy_replay(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"keys", "group_starts", "marks", NULL};
    policy_object *self = (policy_object *)object;
    PyObject *keys_object, *starts_object, *marks_object = Py_None, *result = NULL;
    Py_buffer keys = {0}, starts = {0}, marks = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O", names, &keys_object, &starts_object, &marks_object))
        return NULL;
    if (!get_array(keys_object, &keys, PyBUF_SIMPLE, 4, "il", "keys as int32") ||
        !get_array(starts_object, &starts, PyBUF_SIMPLE, 4, "il", "group starts as int32") ||
        (marks_object != Py_None && !get_array(marks_object, &marks, PyBUF_WRITABLE, 1, "B?", "marks as uint8")))
        goto done;
    if (marks.buf != NULL && marks.shape[0] != keys.shape[0]) {
        PyErr_Format(PyExc_ValueError, "expected a mark for each of %zd keys, got %zd", keys.shape[0], marks.shape[0]);
        goto done;
    }
    if (!check_replay(self, &keys, &starts) || !is_idle(self))
        goto done;
    uint64_t hits = 0;
    Py_ssize_t group = 0, num_groups = starts.shape[0];
    const int32_t *key = keys.buf, *start = starts.buf;
    self->busy = true;
    Py_BEGIN_ALLOW_THREADS
    for (; group < num_groups; group++) {
        Py_ssize_t end = group + 1 < num_groups ? start[group + 1] : keys.shape[0];
        if (!replay_group(self, key + start[group], (size_t)(end - start[group]),
                          marks.buf != NULL ? (uint8_t *)marks.buf + start[group] : NULL, &hits))
            break;
    }
    Py_END_ALLOW_THREADS
    self->busy = false;
    if (group < num_groups)
        PyErr_Format(PyExc_ValueError, "group %zd wants more keys at once than the %u slots hold", group,
                     self->num_slots);
    else
        result = PyLong_FromUnsignedLongLong(hits);
done:
    PyBuffer_Release(&keys);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&marks);
    return result;
}

static PyObject *py_policy_names(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    Py_ssize_t num = 0;
    while (policy_names()[num] != NULL)
        num++;
    PyObject *result = PyTuple_New(num);
    for (Py_ssize_t i = 0; result != NULL && i < num; i++) {
        PyObject *name = PyUnicode_FromString(policy_names()[i]);
        if (name == NULL)
            Py_CLEAR(result);
        else
            PyTuple_SET_ITEM(result, i, name);
    }
    return result;
}

static PyMethodDef policy_methods[] = {
    {"access", py_policy_access, METH_O, "A key is wanted. True if it is in the cache."},
    {"insert", py_policy_insert, METH_O, "The key is in the cache now."},
    {"remove", py_policy_remove, METH_O, "The key left the cache."},
    {"victim", (PyCFunction)(void (*)(void))py_policy_victim, METH_VARARGS | METH_KEYWORDS,
     "victim(pinned=()): the cached key that should go first, none of the pinned; None if none may go."},
    {"replay", (PyCFunction)(void (*)(void))py_policy_replay, METH_VARARGS | METH_KEYWORDS,
     "replay(keys, group_starts, marks=None): hits when groups of keys (int32; one begins at each of group_starts)\n"
     "are wanted one after the other, no key of a group giving way to another. marks (uint8) gets 1 for each hit."},
    {"names", py_policy_names, METH_NOARGS | METH_STATIC, "Names of all policies, the default first."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot policy_slots[] = {
    {Py_tp_doc, "Policy(name, num_keys, num_slots, layers=None, costs=None, half_life=0, shallow_share=0)\n\n"
                "Which cached key gives way; keeps a record of what is cached. layers (int32) and costs (float32)\n"
                "have one value a key. Zero is the default of an option. See policy.h."},
    {Py_tp_new, py_policy_new},
    {Py_tp_dealloc, policy_dealloc},
    {Py_tp_methods, policy_methods},
    {0, NULL},
};

PyType_Spec policy_spec = {"edgeinfer._native.Policy", sizeof(policy_object), 0, Py_TPFLAGS_DEFAULT, policy_slots};

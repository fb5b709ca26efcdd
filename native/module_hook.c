/* Python's view of the graph hook. */
#include "module.h"

#include <dlfcn.h>
#include <string.h>

#include "hook.h"

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
        PyObject *item = Py_BuildValue("(KKsIIOOK)", (unsigned long long)(uintptr_t)r->tensor,
                                       (unsigned long long)(uintptr_t)r->data, r->name, r->recording, r->node,
                                       r->op == h->operations.get_rows ? Py_True : Py_False,
                                       r->through_view ? Py_True : Py_False, (unsigned long long)(uintptr_t)r->ids);
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
        long number, layer = -1, matrix = 0;
        int streamed, rows;
        if (parse_tuple_at(list, i, "(tensor, home, block, streamed, rows, layer of experts, matrix)", "O&O&lpp|ll",
                           to_uint64, &tensor, to_uint64, &home, &number, &streamed, &rows, &layer, &matrix)) {
            if (number >= (long)bound->pager.num_blocks)
                PyErr_Format(PyExc_IndexError, "expected a block below %zu, got %ld", bound->pager.num_blocks, number);
            const expert_cache *cache = bound->pager.experts;
            if (layer >= 0 && (cache == NULL || layer >= (long)cache->num_layers || matrix < 0 ||
                               matrix >= (long)cache->kinds[cache->layers[layer].kind].num_matrices))
                PyErr_Format(PyExc_IndexError, "expected a matrix of a layer of experts, got %ld of %ld", matrix, layer);
            weights[i] = (hook_weight){.experts = layer >= 0, .layer = (uint32_t)layer, .matrix = (uint32_t)matrix,
                                       .tensor = (ggml_view *)(uintptr_t)tensor, .home = (void *)(uintptr_t)home,
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
    hook_point_to_pools(&self->hook);
    hook_exchange_pager(self, bound);
    Py_RETURN_NONE;
}

static PyObject *py_hook_predict(PyObject *object, PyObject *on)
{
    int truth = PyObject_IsTrue(on);
    if (truth < 0)
        return NULL;
    ((hook_object *)object)->hook.predictor.paused = !truth;
    Py_RETURN_NONE;
}

static PyObject *py_hook_set_gates(PyObject *object, PyObject *args)
{
    PyObject *list;
    uint32_t num_guesses;
    if (!PyArg_ParseTuple(args, "OO&", &list, to_uint32, &num_guesses))
        return NULL;
    Py_ssize_t num = PySequence_Size(list);
    if (num < 0)
        return NULL;
    expert_gate *gates = PyMem_Calloc((size_t)num + 1, sizeof *gates);
    if (gates == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < num && !PyErr_Occurred(); i++) {
        uint64_t weights, bias;
        if (parse_tuple_at(list, i, "(weights, bias, width, experts)", "O&O&O&O&", to_uint64, &weights, to_uint64, &bias,
                           to_uint32, &gates[i].width, to_uint32, &gates[i].num_experts)) {
            gates[i].weights = (const float *)(uintptr_t)weights;
            gates[i].bias = (const float *)(uintptr_t)bias;
        }
    }
    int error = PyErr_Occurred() ? 0 : predictor_set(&((hook_object *)object)->hook.predictor, gates, (uint32_t)num, num_guesses);
    PyMem_Free(gates);
    if (error != 0)
        PyErr_NoMemory();
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_hook_log_routing(PyObject *object, PyObject *argument)
{
    int on = PyObject_IsTrue(argument);
    if (on < 0)
        return NULL;
    ((hook_object *)object)->hook.log.on = on != 0;
    Py_RETURN_NONE;
}

/* The numbers as bytes; the log is empty then. */
static PyObject *py_hook_take_routing(PyObject *object, PyObject *unused)
{
    (void)unused;
    routing_log *log = &((hook_object *)object)->hook.log;
    if (log->out_of_memory)
        return PyErr_NoMemory();
    PyObject *numbers = PyBytes_FromStringAndSize((const char *)log->numbers,
                                                  (Py_ssize_t)(log->count * sizeof *log->numbers));
    if (numbers != NULL)
        log->count = log->pass_start = 0;
    return numbers;
}

static PyObject *py_hook_too_many_experts(PyObject *object, void *closure)
{
    (void)closure;
    return PyBool_FromLong(((hook_object *)object)->hook.too_many_experts);
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
     "(tensor, data, name, recording, node, rows, through a view, choice of experts or 0) for each use, in order."},
    {"bind", py_hook_bind, METH_VARARGS,
     "bind(pager, weights): (tensor, home, block or -1, streamed, rows[, layer of experts, matrix]), in order of use."},
    {"set_gates", py_hook_set_gates, METH_VARARGS,
     "set_gates([(weights address or 0, bias address or 0, width, experts)], guesses): predict the next layer's experts."},
    {"predict", py_hook_predict, METH_O, "False: no experts are read ahead until it is True again, as at first."},
    {"log_routing", py_hook_log_routing, METH_O, "True: record what routers choose; see routing_log.h."},
    {"take_routing", py_hook_take_routing, METH_NOARGS, "The int32 numbers recorded so far, as bytes, between passes."},
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
    {"too_many_experts", py_hook_too_many_experts, NULL,
     "Whether the last pass wanted more experts of one layer than there are slots.", NULL},
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

PyType_Spec hook_spec = {"edgeinfer._native.Hook", sizeof(hook_object), 0, Py_TPFLAGS_DEFAULT, hook_slots};

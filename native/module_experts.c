/* Python's view of the cache of experts: how one is described, and its counters. */
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"

static bool parse_kind(PyObject *list, Py_ssize_t index, expert_kind *kind)
{
    PyObject *matrices, *arena;
    if (!parse_tuple_at(list, index, "(slots, matrices)", "O&O", to_uint32, &kind->num_slots, &matrices))
        return false;
    Py_ssize_t num = PySequence_Size(matrices);
    if (num < 1 || num > EXPERT_MATRICES || kind->num_slots == 0 || kind->num_slots > POLICY_MAX_KEYS) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "expected 1 to %d matrices and 1 to %u slots, got %zd and %u",
                         EXPERT_MATRICES, POLICY_MAX_KEYS, num, kind->num_slots);
        return false;
    }
    kind->num_matrices = (uint32_t)num;
    for (Py_ssize_t m = 0; m < num; m++) {
        uint64_t bytes, stride;
        if (!parse_tuple_at(matrices, m, "(bytes, stride, arena)", "O&O&O", to_uint64, &bytes, to_uint64, &stride, &arena))
            return false;
        Py_buffer view; /* the arena outlives the pager, which keeps the description */
        if (PyObject_GetBuffer(arena, &view, PyBUF_WRITABLE) != 0)
            return false;
        bool fits = bytes > 0 && bytes <= stride && stride <= (uint64_t)view.len / kind->num_slots;
        kind->pool[m] = view.buf;
        kind->bytes[m] = (size_t)bytes;
        kind->stride[m] = (size_t)stride;
        PyBuffer_Release(&view);
        if (!fits) {
            PyErr_SetString(PyExc_ValueError, "expected slots that hold an expert and lie inside their arena");
            return false;
        }
    }
    return true;
}

static bool parse_layer(PyObject *list, Py_ssize_t index, const pager *p, const expert_kind *kinds, uint32_t num_kinds,
                        uint32_t num_experts, expert_layer *layer)
{
    PyObject *places;
    if (!parse_tuple_at(list, index, "(kind, experts, places)", "O&O&O", to_uint32, &layer->kind, to_uint32,
                        &layer->num_experts, &places))
        return false;
    if (layer->num_experts < 1 || layer->num_experts > num_experts) {
        PyErr_Format(PyExc_ValueError, "expected 1 to %u experts in layer %zd, got %u", num_experts, index,
                     layer->num_experts);
        return false;
    }
    if (layer->kind >= num_kinds || PySequence_Size(places) != kinds[layer->kind].num_matrices) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "layer %zd is of an unknown kind, or has not all of its matrices", index);
        return false;
    }
    for (uint32_t m = 0; m < kinds[layer->kind].num_matrices; m++) {
        if (!parse_tuple_at(places, m, "(source, offset)", "O&O&", to_uint32, &layer->source[m], to_uint64,
                            &layer->offset[m]))
            return false;
        uint64_t size = layer->source[m] < p->num_sources ? (uint64_t)p->sources[layer->source[m]].size : 0;
        if (layer->offset[m] > size || kinds[layer->kind].bytes[m] > (size - layer->offset[m]) / layer->num_experts) {
            PyErr_Format(PyExc_ValueError, "the experts of layer %zd do not lie inside their file", index);
            return false;
        }
    }
    return true;
}

bool give_experts(pager *p, PyObject *description)
{
    const char *policy_name;
    PyObject *kind_list, *layer_list;
    uint32_t num_experts;
    if (!PyTuple_Check(description)) {
        PyErr_Format(PyExc_TypeError, "expected a tuple (experts, policy, kinds, layers), got %s",
                     Py_TYPE(description)->tp_name);
        return false;
    }
    if (!PyArg_ParseTuple(description, "O&sOO", to_uint32, &num_experts, &policy_name, &kind_list, &layer_list))
        return false;
    Py_ssize_t num_kinds = PySequence_Size(kind_list), num_layers = PySequence_Size(layer_list);
    if (num_kinds < 1 || num_layers < 1 || num_experts < 1 || num_layers > (Py_ssize_t)(POLICY_MAX_KEYS / num_experts)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "expected kinds, layers and experts");
        return false;
    }
    uint32_t num_keys = (uint32_t)num_layers * num_experts;
    expert_kind *kinds = calloc((size_t)num_kinds, sizeof *kinds);
    expert_layer *layers = calloc((size_t)num_layers, sizeof *layers);
    uint32_t *layer_of = malloc(num_keys * sizeof *layer_of);
    bool good = kinds && layers && layer_of;
    if (!good)
        PyErr_NoMemory();
    for (Py_ssize_t k = 0; good && k < num_kinds; k++)
        good = parse_kind(kind_list, k, &kinds[k]);
    for (Py_ssize_t l = 0; good && l < num_layers; l++)
        good = parse_layer(layer_list, l, p, kinds, (uint32_t)num_kinds, num_experts, &layers[l]);
    for (uint32_t key = 0; good && key < num_keys; key++)
        layer_of[key] = key / num_experts;
    for (Py_ssize_t k = 0; good && k < num_kinds; k++) {
        policy_options options = {.layer = layer_of, .num_layers = (uint32_t)num_layers};
        kinds[k].policy = policy_new(policy_name, num_keys, kinds[k].num_slots, &options);
        good = kinds[k].policy != NULL;
        if (!good && errno == ENOMEM)
            PyErr_NoMemory();
        else if (!good)
            PyErr_Format(PyExc_ValueError, "expected the name of a policy, got %s", policy_name);
    }
    free(layer_of);
    if (!good) {
        for (Py_ssize_t k = 0; kinds != NULL && k < num_kinds; k++)
            policy_free(kinds[k].policy);
        free(kinds);
        free(layers);
        return false;
    }
    p->experts = experts_new(layers, (uint32_t)num_layers, num_experts, kinds, (uint32_t)num_kinds);
    if (p->experts == NULL)
        PyErr_NoMemory();
    return p->experts != NULL;
}

PyObject *describe_expert_statistics(pager *p)
{
    pthread_mutex_lock(&p->lock);
    expert_statistics s = p->experts->statistics;
    pthread_mutex_unlock(&p->lock);
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsK}", "wanted", s.wanted, "hits", s.hits, "guess_hits", s.guess_hits,
                         "guesses", s.guesses, "guesses_used", s.guesses_used, "predicted", s.predicted,
                         "predicted_right", s.predicted_right,
                         "predicted_wanted", s.predicted_wanted, "prefill_wanted", s.prefill_wanted, "prefill_hits",
                         s.prefill_hits);
}

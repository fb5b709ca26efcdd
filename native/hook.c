#include "hook_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static size_t hash_address(const void *address, size_t size)
{
    uint64_t x = (uint64_t)(uintptr_t)address >> 4;
    x *= 0x9E3779B97F4A7C15u;
    return (size_t)(x >> 32) & (size - 1);
}

static hook_weight *find_weight(hook *h, const ggml_view *tensor)
{
    if (h->table_size == 0)
        return NULL;
    for (size_t i = hash_address(tensor, h->table_size);; i = (i + 1) & (h->table_size - 1)) {
        uint32_t entry = h->table[i];
        if (entry == 0)
            return NULL;
        if (h->weights[entry - 1].tensor == tensor)
            return &h->weights[entry - 1];
    }
}

static bool in_model(const hook *h, const void *address)
{
    for (size_t i = 0; i < h->num_ranges; i++)
        if ((uintptr_t)address >= h->ranges[i].start && (uintptr_t)address < h->ranges[i].end)
            return true;
    return false;
}

static bool only_renames(const hook *h, const ggml_view *node)
{
    const ggml_operations *ops = &h->operations;
    return node->op == ops->none || node->op == ops->view || node->op == ops->reshape || node->op == ops->permute ||
           node->op == ops->transpose;
}

/* ---- recording ---------------------------------------------------------------------------------------------- */

static void record_use(hook *h, ggml_view *weight, const ggml_view *node, bool through_view)
{
    if (h->num_records == h->records_capacity) {
        size_t capacity = h->records_capacity ? 2 * h->records_capacity : 1024;
        hook_record *grown = realloc(h->records, capacity * sizeof *grown);
        if (grown == NULL) {
            h->out_of_memory = true;
            return;
        }
        h->records = grown;
        h->records_capacity = capacity;
    }
    hook_record *r = &h->records[h->num_records++];
    r->tensor = weight;
    r->data = weight->data;
    r->op = node->op;
    r->node = h->nodes;
    r->recording = h->recordings;
    r->through_view = through_view;
    r->experts = node->op == h->operations.mul_mat_id && node->src[0] == weight;
    r->ids = r->experts ? node->src[2] : NULL;
    memcpy(r->name, weight->name, sizeof r->name);
    r->name[sizeof r->name - 1] = 0;
}

static bool record_node(hook *h, const ggml_view *node)
{
    h->nodes++;
    for (int i = 0; i < GGML_VIEW_SOURCES; i++) {
        ggml_view *source = node->src[i];
        if (source == NULL || !in_model(h, source->data))
            continue;
        ggml_view *weight = source->view_src ? source->view_src : source;
        record_use(h, weight, node, source->view_src != NULL || only_renames(h, node));
    }
    return false; /* all nodes are asked about before the first is computed */
}

/* ---- passes ------------------------------------------------------------------------------------------------- */

static void give_back(hook *h)
{
    for (size_t i = 0; i < h->num_held; i++)
        h->held[i]->tensor->data = h->held[i]->home;
    h->num_held = 0;
    for (size_t i = 0; i < h->num_patched; i++)
        h->patched[i].node->src[2] = h->patched[i].ids;
    h->num_patched = 0;
    pager_release(h->pager);
}

void hook_silence(hook *h, ggml_view *node)
{
    if (h->silenced != NULL) /* nodes come in order: that one is past */
        h->silenced->op = h->silenced_op;
    h->silenced = node;
    h->silenced_op = node->op;
    node->op = h->operations.none;
}

void hook_refuse(hook *h, ggml_view *node, const ggml_view *weight, const char *why)
{
    char text[PAGER_TEXT_BYTES];
    snprintf(text, sizeof text, "weight %.63s is used %s", weight->name, why);
    pager_fail(h->pager, EINVAL, text);
    hook_silence(h, node);
}

/* Choices of experts are the only integers that a graph computes: behind each the run ends, so that it can be read. */
static bool computes_a_choice(const hook *h, const ggml_view *node)
{
    return h->pager->experts != NULL && node->type == GGML_VIEW_I32 && !only_renames(h, node);
}

static bool ask(hook *h, ggml_view *node)
{
    /* Ends the first run behind the first node, so that no wait comes before the abort callback can act. */
    bool stop = h->pass_starts || computes_a_choice(h, node);
    h->pass_starts = false;
    if (pager_halted(h->pager)) {
        hook_silence(h, node);
        return true;
    }
    bool next_ready = true;
    for (int i = 0; i < GGML_VIEW_SOURCES; i++) {
        ggml_view *source = node->src[i];
        if (source == NULL || source == node)
            continue;
        ggml_view *tensor = source->view_src ? source->view_src : source;
        hook_weight *weight = find_weight(h, tensor);
        if (weight == NULL) {
            if (tensor->op == h->operations.none && in_model(h, tensor->data)) {
                hook_refuse(h, node, tensor, "that was not seen when the model was loaded");
                return true;
            }
            continue;
        }
        if (weight->experts) {
            if (!hook_ask_for_experts(h, node, weight, &stop))
                return true;
            continue;
        }
        if (weight->rows && node->op == h->operations.get_rows && i == 0)
            continue;
        if (!weight->has_block || (weight->streamed && (source != tensor || only_renames(h, node)))) {
            hook_refuse(h, node, tensor, "in a way that was not seen when the model was loaded");
            return true;
        }
        uint8_t *address;
        if (h->num_held == sizeof h->held / sizeof *h->held ||
            !pager_acquire(h->pager, weight->block, &address, &next_ready)) {
            hook_silence(h, node);
            return true;
        }
        if (weight->streamed) {
            tensor->data = address;
            h->held[h->num_held++] = weight;
            stop = true; /* given back as soon as it is used, so that reading ahead never stands still for it */
        }
    }
    return stop || !next_ready;
}

bool hook_evaluate(void *tensor, bool asking, void *user_data)
{
    hook *h = user_data;
    if (h->recording)
        return record_node(h, tensor);
    if (h->pager == NULL)
        return false;
    if (asking)
        return ask(h, tensor);
    give_back(h);
    return pager_wait_next(h->pager);
}

bool hook_should_abort(void *user_data)
{
    hook *h = user_data;
    return h->recording || atomic_load_explicit(&h->interrupted, memory_order_relaxed) ||
           (h->pager != NULL && pager_halted(h->pager));
}

void hook_begin_pass(hook *h)
{
    h->ids = NULL;
    h->too_many_experts = false;
    h->pass_starts = true;
    routing_log_begin_pass(&h->log);
    predictor_begin_pass(&h->predictor);
    h->nodes = 0;
    h->recordings += h->recording;
}

void hook_end_pass(hook *h)
{
    if (h->silenced != NULL)
        h->silenced->op = h->silenced_op;
    h->silenced = NULL;
    if (h->pager != NULL && pager_halted(h->pager))
        routing_log_drop_pass(&h->log);
    if (h->pager != NULL)
        give_back(h);
}

/* ---- what it knows ------------------------------------------------------------------------------------------ */

int hook_set_ranges(hook *h, const hook_range *ranges, size_t num_ranges)
{
    hook_range *copy = malloc((num_ranges ? num_ranges : 1) * sizeof *copy);
    if (copy == NULL)
        return ENOMEM;
    memcpy(copy, ranges, num_ranges * sizeof *copy);
    free(h->ranges);
    h->ranges = copy;
    h->num_ranges = num_ranges;
    return 0;
}

int hook_bind(hook *h, pager *p, const hook_weight *weights, size_t num_weights)
{
    size_t size = 16;
    while (size < 2 * num_weights)
        size *= 2;
    hook_weight *copy = malloc((num_weights ? num_weights : 1) * sizeof *copy);
    uint32_t *table = calloc(size, sizeof *table);
    if (copy == NULL || table == NULL) {
        free(copy);
        free(table);
        return ENOMEM;
    }
    memcpy(copy, weights, num_weights * sizeof *copy);
    for (size_t n = 0; n < num_weights; n++) {
        size_t i = hash_address(copy[n].tensor, size);
        while (table[i] != 0)
            i = (i + 1) & (size - 1);
        table[i] = (uint32_t)n + 1;
    }
    hook_weight *before = NULL;
    for (size_t n = 0; n < num_weights; n++) {
        if (!copy[n].experts)
            continue;
        if (before != NULL)
            before->switches = before->layer != copy[n].layer;
        copy[n].switches = true;
        before = &copy[n];
    }
    free(h->weights);
    free(h->table);
    h->weights = copy;
    h->num_weights = num_weights;
    h->table = table;
    h->table_size = size;
    h->pager = p;
    h->num_held = 0;
    return 0;
}

void hook_clear(hook *h)
{
    routing_log_clear(&h->log);
    predictor_clear(&h->predictor);
    free(h->chosen);
    free(h->slots);
    h->chosen = h->slots = NULL;
    free(h->ranges);
    free(h->weights);
    free(h->table);
    free(h->records);
    h->ranges = NULL;
    h->weights = NULL;
    h->table = NULL;
    h->records = NULL;
    h->num_ranges = h->num_weights = h->table_size = h->num_records = h->records_capacity = 0;
    h->pager = NULL;
}

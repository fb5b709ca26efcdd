/* The graph hook: what llama.cpp calls for every node of a graph, and the weights that it makes present in time.

   Before the nodes of a run are computed llama.cpp asks about each (ask = true): true ends the run behind that node,
   and the hook is called again (ask = false) once the run is computed. So a weight is acquired when its node is asked
   about, and waiting for the next one happens between runs, when nothing asked about is still to be computed. */
#ifndef EDGEINFER_HOOK_H
#define EDGEINFER_HOOK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "experts.h"
#include "ggml_view.h"
#include "pager.h"
#include "predict.h"
#include "routing_log.h"

/* A weight tensor of the model and its block. */
typedef struct {
    ggml_view *tensor;
    void *home;          /* its address while it is absent: guarded address space */
    uint32_t block;      /* used by products */
    bool has_block;
    bool streamed;
    bool rows;           /* GET_ROWS on it finds its rows at home */
    bool experts;        /* its experts are in a pool: these two say which */
    uint32_t layer, matrix;
    bool switches;       /* the next weight with experts is of another layer of them: a run ends behind this one */
} hook_weight;

/* One use of a weight, as the recording pass saw it. */
typedef struct {
    ggml_view *tensor;
    void *data;
    int op;
    uint32_t node;   /* ordinal of the node in its pass */
    uint32_t recording;
    bool through_view;
    bool experts; /* multiplied expert by expert */
    const void *ids; /* the choice of experts, then */
    char name[64];
} hook_record;

/* Addresses that belong to the model file's mapping: a leaf in there that is no known weight must not be computed. */
typedef struct {
    uintptr_t start, end;
} hook_range;

typedef struct {
    ggml_operations operations;
    pager *pager; /* NULL while recording, and where nothing is paged */
    atomic_bool interrupted;

    hook_range *ranges;
    size_t num_ranges;

    hook_weight *weights;
    size_t num_weights;
    uint32_t *table; /* open addressing over tensor addresses: index + 1 into weights, 0 empty */
    size_t table_size;

    bool recording;
    uint32_t recordings, nodes;
    hook_record *records;
    size_t num_records, records_capacity;
    bool out_of_memory;

    bool pass_starts;
    hook_weight *held[GGML_VIEW_SOURCES * 2];
    size_t num_held;
    /* The experts that the router of the current layer chose, as numbers of slots, in place of the tensor `ids`. */
    const ggml_view *ids;
    uint32_t selected_layer;
    ggml_view shadow;
    int32_t *chosen, *slots; /* num_chosen: expert numbers, and their slots */
    size_t chosen_capacity;
    struct {
        ggml_view *node, *ids;
    } patched[EXPERT_MATRICES];
    size_t num_patched;
    bool too_many_experts;   /* the last pass wanted more experts of one layer than there are slots */
    expert_predictor predictor;
    routing_log log;

    /* A node that must not be computed: its operation is taken away until the next pass. */
    ggml_view *silenced;
    int silenced_op;
} hook;

/* The two callbacks for llama_context_params: cb_eval and abort_callback; user data is the hook. */
bool hook_evaluate(void *tensor, bool ask, void *user_data);
bool hook_should_abort(void *user_data);

/* Takes over nothing; copies the weights, which come in their order of use. 0 or an errno. */
int hook_bind(hook *h, pager *p, const hook_weight *weights, size_t num_weights);
/* Weights that hold experts become their pools: data, number of experts and strides. Once, behind hook_bind. */
void hook_point_to_pools(hook *h);
int hook_set_ranges(hook *h, const hook_range *ranges, size_t num_ranges);
void hook_clear(hook *h);

/* Around each llama_decode. */
void hook_begin_pass(hook *h);
void hook_end_pass(hook *h);

#endif

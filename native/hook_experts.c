/* Products by experts: what the router chose is looked up in the cache, and the product is given slots instead. */
#include "hook_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The expert numbers in `ids`, which is computed, one after the other. false: no memory. */
static bool copy_ids(hook *h, const ggml_view *ids)
{
    size_t count = (size_t)(ids->ne[0] * ids->ne[1]);
    if (count > h->chosen_capacity) {
        int32_t *chosen = realloc(h->chosen, count * sizeof *chosen);
        h->chosen = chosen ? chosen : h->chosen;
        int32_t *slots = realloc(h->slots, count * sizeof *slots);
        h->slots = slots ? slots : h->slots;
        if (chosen == NULL || slots == NULL)
            return false;
        h->chosen_capacity = count;
    }
    for (int64_t t = 0; t < ids->ne[1]; t++)
        for (int64_t k = 0; k < ids->ne[0]; k++)
            memcpy(&h->chosen[t * ids->ne[0] + k], (char *)ids->data + t * (int64_t)ids->nb[1] + k * (int64_t)ids->nb[0],
                   sizeof *h->chosen);
    return true;
}

/* While this layer computes, the next one's likely experts are read. */
static void predict_next(hook *h, const ggml_view *node, uint32_t layer)
{
    const ggml_view *input = node->src[1], *ids = node->src[2];
    if (ids->ne[1] != 1)
        return;
    bool known = input->ne[1] * input->ne[2] == 1; /* all experts were given the same: what the gate was given */
    uint32_t guesses = h->predictor.num_guesses, ranked = h->log.on ? 2 * guesses : guesses;
    uint32_t found = predictor_next(&h->predictor, layer, h->chosen, (size_t)ids->ne[0],
                                    known ? input->data : NULL, input->ne[0], ranked);
    if (found == 0)
        return;
    if (h->predictor.gates[layer + 1].weights != NULL) /* what a trace tells of is the gate */
        routing_log_add(&h->log, ROUTING_PREDICTION, layer + 1, 1, found, (const int32_t *)h->predictor.guesses);
    experts_predict(h->pager, layer + 1, h->predictor.guesses, found < guesses ? found : guesses);
}

/* The slots of the experts that the router chose for this layer, as a tensor in the place of its choice. */
static bool select_experts(hook *h, ggml_view *node, const hook_weight *weight)
{
    ggml_view *ids = node->src[2];
    if (h->num_patched > 0) { /* the selection before is still to be computed with */
        hook_refuse(h, node, weight->tensor, "among products of other experts");
        return false;
    }
    int error = ENOMEM;
    bool good = copy_ids(h, ids);
    if (!good)
        pager_fail(h->pager, ENOMEM, "no memory for the choice of experts");
    good = good && experts_select(h->pager, weight->layer, h->chosen, (size_t)(ids->ne[0] * ids->ne[1]),
                                  ids->ne[1] == 1, h->slots, &error);
    if (!good && error == E2BIG) {
        h->too_many_experts = true;
        pager_abort(h->pager);
    } else if (!good && error == EINVAL) {
        hook_refuse(h, node, weight->tensor, "with a choice of experts that it does not have");
        return false;
    }
    if (!good) {
        hook_silence(h, node);
        return false;
    }
    h->shadow = *ids;
    h->shadow.op = h->operations.none;
    h->shadow.view_src = NULL;
    h->shadow.data = h->slots;
    h->shadow.nb[0] = sizeof(int32_t);
    for (int d = 1; d < 4; d++)
        h->shadow.nb[d] = h->shadow.nb[d - 1] * (size_t)ids->ne[d - 1];
    for (int i = 0; i < GGML_VIEW_SOURCES; i++)
        h->shadow.src[i] = NULL;
    h->ids = ids;
    h->selected_layer = weight->layer;
    routing_log_add(&h->log, ROUTING_CHOICE, weight->layer, (size_t)ids->ne[1], (size_t)ids->ne[0], h->chosen);
    predict_next(h, node, weight->layer);
    return true;
}

bool hook_ask_for_experts(hook *h, ggml_view *node, const hook_weight *weight, bool *stop)
{
    if (node->op != h->operations.mul_mat_id || node->src[0] != weight->tensor ||
        h->num_patched == EXPERT_MATRICES) {
        hook_refuse(h, node, weight->tensor, "in a way that was not seen when the model was loaded");
        return false;
    }
    if ((h->ids != node->src[2] || h->selected_layer != weight->layer) && !select_experts(h, node, weight))
        return false;
    bool rest_ready;
    if (!experts_wait(h->pager, weight->matrix, &rest_ready)) {
        hook_silence(h, node);
        return false;
    }
    h->patched[h->num_patched].node = node;
    h->patched[h->num_patched++].ids = node->src[2];
    node->src[2] = &h->shadow;
    /* Computing begins while later matrices are being read; and behind the last product of a choice, or where those of
       two choices take turns, the slots may go. */
    *stop = *stop || !rest_ready || weight->switches;
    if (weight->switches)
        h->ids = NULL;
    return true;
}

void hook_point_to_pools(hook *h)
{
    for (size_t i = 0; i < h->num_weights; i++) {
        const hook_weight *weight = &h->weights[i];
        if (!weight->experts)
            continue;
        const expert_cache *cache = h->pager->experts;
        const expert_kind *kind = &cache->kinds[cache->layers[weight->layer].kind];
        weight->tensor->data = kind->pool[weight->matrix];
        weight->tensor->ne[2] = kind->num_slots;
        weight->tensor->nb[2] = kind->stride[weight->matrix];
        weight->tensor->nb[3] = kind->stride[weight->matrix] * kind->num_slots;
    }
}

/* Prediction of the next layer's experts by routing paths: which experts followed which, counted while decoding
   (ExpertFlow, arXiv:2410.17954, learns such paths before; here they are learned as they are used). For layers whose
   gate cannot be asked ahead. */
#ifndef EDGEINFER_PREDICT_PATH_H
#define EDGEINFER_PREDICT_PATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t num_layers, num_experts; /* num_experts: of the layer that has most */
    uint16_t *followed;    /* [num_layers][num_experts][num_experts]: of layer l, an expert of l + 1 after one of l */
    uint32_t layer;        /* of the choice that was seen last; num_layers: none in this pass */
    uint32_t *chosen;      /* its experts */
    uint32_t num_chosen;
    uint32_t *scores;      /* scratch, num_experts */
} path_table;

/* false: no memory; the table is then empty and clear. */
bool path_init(path_table *table, uint32_t num_layers, uint32_t num_experts);
void path_clear(path_table *table);

/* A pass begins: no choice of another token is followed. */
void path_begin_pass(path_table *table);

/* One token has chosen these experts of `layer`; numbers that the layer does not have are left out. */
void path_learn(path_table *table, uint32_t layer, const int32_t *experts, size_t num_experts);

/* The `most` experts of the layer behind the last choice that followed its experts most often, best first; fewer where
   fewer ever followed. Gives their number. */
uint32_t path_predict(const path_table *table, uint32_t *best, uint32_t most);

#endif

/* Which experts the next layer will want, while this one computes: by its gate where that can be asked ahead, by routing
   paths where not. (What the token before used is in the cache anyway.) */
#ifndef EDGEINFER_PREDICT_H
#define EDGEINFER_PREDICT_H

#include "predict_gate.h"
#include "predict_path.h"

/* A table of paths that would be larger is not kept: it comes on top of what the budget was planned for. */
#define PREDICT_PATH_BYTES (4u << 20)

typedef struct {
    expert_gate *gates; /* of each layer of experts; weights NULL: it cannot be asked. NULL: nothing is predicted */
    uint32_t num_layers, num_guesses;
    float *gate_values;
    uint32_t *guesses;  /* as many as a layer has experts */
    path_table paths;   /* num_layers 0: every gate can be asked */
    bool paused;
} expert_predictor;

/* Gates are copied. 0 or an errno; then nothing is predicted. */
int predictor_set(expert_predictor *p, const expert_gate *gates, uint32_t num_layers, uint32_t num_guesses);
void predictor_clear(expert_predictor *p);
void predictor_begin_pass(expert_predictor *p);

/* One token has chosen these experts of `layer`, whose gate was given `input`, float32 (width), or NULL where that is not
   known. p->guesses becomes the experts of the next layer, best first: `count` of them, or fewer. Gives their number. */
uint32_t predictor_next(expert_predictor *p, uint32_t layer, const int32_t *chosen, size_t num_chosen,
                        const float *input, int64_t width, uint32_t count);

#endif

#include "predict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int predictor_set(expert_predictor *p, const expert_gate *gates, uint32_t num_layers, uint32_t num_guesses)
{
    predictor_clear(p);
    uint32_t most = 1;
    bool all_asked = true;
    for (uint32_t i = 0; i < num_layers; i++) {
        most = gates[i].num_experts > most ? gates[i].num_experts : most;
        all_asked = all_asked && (i == 0 || gates[i].weights != NULL);
    }
    p->gates = malloc((num_layers ? num_layers : 1) * sizeof *p->gates);
    p->gate_values = malloc(most * sizeof *p->gate_values);
    p->guesses = malloc(most * sizeof *p->guesses);
    bool table_fits = (uint64_t)num_layers * most * most * sizeof(uint16_t) <= PREDICT_PATH_BYTES;
    bool good = p->gates != NULL && p->gate_values != NULL && p->guesses != NULL;
    if (!good || (!all_asked && table_fits && !path_init(&p->paths, num_layers, most))) {
        predictor_clear(p);
        return ENOMEM;
    }
    memcpy(p->gates, gates, num_layers * sizeof *gates);
    p->num_layers = num_layers;
    p->num_guesses = num_guesses < most ? num_guesses : most;
    return 0;
}

void predictor_clear(expert_predictor *p)
{
    free(p->gates);
    free(p->gate_values);
    free(p->guesses);
    path_clear(&p->paths);
    *p = (expert_predictor){.paused = p->paused};
}

void predictor_begin_pass(expert_predictor *p) { path_begin_pass(&p->paths); }

uint32_t predictor_next(expert_predictor *p, uint32_t layer, const int32_t *chosen, size_t num_chosen,
                        const float *input, int64_t width, uint32_t count)
{
    if (p->gates == NULL)
        return 0;
    path_learn(&p->paths, layer, chosen, num_chosen);
    if (p->paused || layer + 1 >= p->num_layers)
        return 0;
    const expert_gate *gate = &p->gates[layer + 1];
    count = count < gate->num_experts ? count : gate->num_experts;
    if (gate->weights == NULL || input == NULL || width != gate->width)
        return path_predict(&p->paths, p->guesses, count);
    predict_by_gate(gate, input, p->gate_values, p->guesses, count);
    return count;
}

/* Prediction of the next layer's experts by its own gate, given this layer's gate input (Fate, arXiv:2502.12224). */
#ifndef EDGEINFER_PREDICT_GATE_H
#define EDGEINFER_PREDICT_GATE_H

#include <stddef.h>
#include <stdint.h>

/* The router of one layer: float32 (num_experts, width) weights, and num_experts biases or NULL. */
typedef struct {
    const float *weights, *bias;
    uint32_t width, num_experts;
} expert_gate;

/* The `count` experts with the largest gate values for float32 (width) `input`, best first. `values`: scratch of
   num_experts. */
void predict_by_gate(const expert_gate *gate, const float *input, float *values, uint32_t *best, uint32_t count);

#endif

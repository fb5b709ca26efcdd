#include "predict_gate.h"

#include <math.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(32)));

static float dot(const float *a, const float *b, uint32_t width)
{
    lanes sums[4] = {{0}};
    uint32_t i = 0;
    for (; i + 32 <= width; i += 32)
        for (int k = 0; k < 4; k++) {
            lanes x, y;
            memcpy(&x, a + i + 8 * k, sizeof x);
            memcpy(&y, b + i + 8 * k, sizeof y);
            sums[k] += x * y;
        }
    lanes all = sums[0] + sums[1] + sums[2] + sums[3];
    float sum = 0;
    for (int k = 0; k < 8; k++)
        sum += all[k];
    for (; i < width; i++)
        sum += a[i] * b[i];
    return sum;
}

void predict_by_gate(const expert_gate *gate, const float *input, float *values, uint32_t *best, uint32_t count)
{
    for (uint32_t e = 0; e < gate->num_experts; e++)
        values[e] = dot(gate->weights + (size_t)e * gate->width, input, gate->width) + (gate->bias ? gate->bias[e] : 0);
    for (uint32_t n = 0; n < count; n++) {
        uint32_t top = 0;
        for (uint32_t e = 1; e < gate->num_experts; e++)
            if (values[e] > values[top])
                top = e;
        best[n] = top;
        values[top] = -INFINITY;
    }
}

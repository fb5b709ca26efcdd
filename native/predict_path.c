#include "predict_path.h"

#include <stdlib.h>
#include <string.h>

bool path_init(path_table *table, uint32_t num_layers, uint32_t num_experts)
{
    *table = (path_table){.num_layers = num_layers, .num_experts = num_experts, .layer = num_layers};
    size_t row = num_experts ? num_experts : 1;
    table->followed = calloc((num_layers ? num_layers : 1) * row, row * sizeof *table->followed);
    table->chosen = malloc(row * sizeof *table->chosen);
    table->scores = malloc(row * sizeof *table->scores);
    if (table->followed != NULL && table->chosen != NULL && table->scores != NULL)
        return true;
    path_clear(table);
    return false;
}

void path_clear(path_table *table)
{
    free(table->followed);
    free(table->chosen);
    free(table->scores);
    *table = (path_table){0};
}

void path_begin_pass(path_table *table)
{
    table->layer = table->num_layers; /* none */
    table->num_chosen = 0;
}

static uint16_t *row_of(const path_table *table, uint32_t layer, uint32_t expert)
{
    return table->followed + ((size_t)layer * table->num_experts + expert) * table->num_experts;
}

/* Old habits fade: a full counter halves its row. */
static void count(const path_table *table, uint16_t *row, uint32_t expert)
{
    if (row[expert] == UINT16_MAX)
        for (uint32_t e = 0; e < table->num_experts; e++)
            row[e] /= 2;
    row[expert]++;
}

void path_learn(path_table *table, uint32_t layer, const int32_t *experts, size_t num_experts)
{
    if (layer >= table->num_layers)
        return;
    bool follows = table->layer < table->num_layers && table->layer + 1 == layer;
    for (uint32_t i = 0; follows && i < table->num_chosen; i++)
        for (size_t k = 0; k < num_experts; k++)
            if (experts[k] >= 0 && (uint32_t)experts[k] < table->num_experts)
                count(table, row_of(table, table->layer, table->chosen[i]), (uint32_t)experts[k]);
    table->layer = layer;
    table->num_chosen = 0;
    for (size_t k = 0; k < num_experts && table->num_chosen < table->num_experts; k++)
        if (experts[k] >= 0 && (uint32_t)experts[k] < table->num_experts)
            table->chosen[table->num_chosen++] = (uint32_t)experts[k];
}

uint32_t path_predict(const path_table *table, uint32_t *best, uint32_t most)
{
    if (table->layer >= table->num_layers || table->layer + 1 >= table->num_layers)
        return 0;
    memset(table->scores, 0, table->num_experts * sizeof *table->scores);
    for (uint32_t i = 0; i < table->num_chosen; i++) {
        const uint16_t *row = row_of(table, table->layer, table->chosen[i]);
        for (uint32_t e = 0; e < table->num_experts; e++)
            table->scores[e] += row[e];
    }
    uint32_t found = 0;
    for (; found < most; found++) {
        uint32_t top = 0;
        for (uint32_t e = 1; e < table->num_experts; e++)
            if (table->scores[e] > table->scores[top])
                top = e;
        if (table->scores[top] == 0)
            break;
        best[found] = top;
        table->scores[top] = 0;
    }
    return found;
}

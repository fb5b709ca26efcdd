/* What the routers of a model chose, pass by pass, as it is recorded for a trace. */
#ifndef EDGEINFER_ROUTING_LOG_H
#define EDGEINFER_ROUTING_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { ROUTING_CHOICE = 0, ROUTING_PREDICTION = 1 } routing_entry_kind;

/* Entries one behind the other: kind, layer of experts, rows (tokens), columns (experts, the best first), numbers. */
typedef struct {
    bool on, out_of_memory;
    int32_t *numbers;
    size_t count, capacity;
    size_t pass_start; /* a pass that does not end well leaves nothing */
} routing_log;

void routing_log_add(routing_log *log, routing_entry_kind kind, uint32_t layer, size_t rows, size_t columns,
                     const int32_t *numbers);
void routing_log_begin_pass(routing_log *log);
void routing_log_drop_pass(routing_log *log);
void routing_log_clear(routing_log *log);

#endif

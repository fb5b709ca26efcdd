#include "routing_log.h"

#include <stdlib.h>
#include <string.h>

void routing_log_add(routing_log *log, routing_entry_kind kind, uint32_t layer, size_t rows, size_t columns,
                     const int32_t *numbers)
{
    size_t more = 4 + rows * columns;
    if (!log->on || log->out_of_memory)
        return;
    if (log->count + more > log->capacity) {
        size_t capacity = 2 * (log->count + more);
        int32_t *grown = realloc(log->numbers, capacity * sizeof *grown);
        if (grown == NULL) {
            log->out_of_memory = true;
            return;
        }
        log->numbers = grown;
        log->capacity = capacity;
    }
    int32_t head[4] = {(int32_t)kind, (int32_t)layer, (int32_t)rows, (int32_t)columns};
    memcpy(log->numbers + log->count, head, sizeof head);
    memcpy(log->numbers + log->count + 4, numbers, rows * columns * sizeof *numbers);
    log->count += more;
}

void routing_log_begin_pass(routing_log *log) { log->pass_start = log->count; }

void routing_log_drop_pass(routing_log *log) { log->count = log->pass_start; }

void routing_log_clear(routing_log *log)
{
    free(log->numbers);
    memset(log, 0, sizeof *log);
}

/* Tables of which a pass looks up only some rows: these are brought to their places before it, and dropped after it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "pager.h"

static int compare_rows(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

int pager_open_rows(pager *p, uint32_t number, size_t row_bytes, const void *rows, size_t num_rows)
{
    block *b = &p->blocks[number];
    source *file = &p->sources[b->source];
    int error = 0;
    char text[PAGER_TEXT_BYTES] = "";
    int32_t *sorted = malloc((num_rows ? num_rows : 1) * sizeof *sorted);
    if (sorted == NULL) {
        pager_fail(p, ENOMEM, "no memory to sort the rows of a table");
        return ENOMEM;
    }
    memcpy(sorted, rows, num_rows * sizeof *sorted);
    qsort(sorted, num_rows, sizeof *sorted, compare_rows);
    uint64_t bytes = 0;
    for (size_t i = 0; i < num_rows && error == 0;) {
        if (sorted[i] < 0 || (uint64_t)sorted[i] >= b->bytes / row_bytes) {
            error = EINVAL;
            snprintf(text, sizeof text, "expected rows below %llu, got row %d: %s",
                     (unsigned long long)(b->bytes / row_bytes), sorted[i], file->path);
            break;
        }
        /* Neighbouring rows share pages: read each stretch of pages once, but nothing outside the table. */
        uint64_t start = round_down(b->offset + (uint64_t)sorted[i] * row_bytes, p->alignment);
        uint64_t needed, end = start;
        if (start < b->offset)
            start = b->offset;
        do {
            needed = b->offset + ((uint64_t)sorted[i] + 1) * row_bytes;
            end = round_up(needed, p->alignment);
            if (end > b->offset + b->bytes)
                end = b->offset + b->bytes;
            i++;
        } while (i < num_rows && (uint64_t)sorted[i] < b->bytes / row_bytes &&
                 b->offset + (uint64_t)sorted[i] * row_bytes <= end);
        void *to = (void *)((uintptr_t)b->home + start - b->offset);
        if (memory_open(to, end - start) != 0)
            error = errno;
        else
            error = source_read(file, to, start, end - start, needed - start);
        bytes += end - start;
    }
    pthread_mutex_lock(&p->lock);
    p->statistics.row_bytes += bytes;
    if (text[0] != 0)
        pager_fail_locked(p, error, text);
    else if (error != 0)
        pager_fail_read_locked(p, error, b->source, b->offset, b->bytes);
    pthread_mutex_unlock(&p->lock);
    free(sorted);
    return error;
}

void pager_close_rows(pager *p, uint32_t number)
{
    /* The first and last page may hold a neighbour's bytes too: they stay. */
    block *b = &p->blocks[number];
    uintptr_t start = round_up((uintptr_t)b->home, memory_page_bytes());
    uintptr_t end = round_down((uintptr_t)b->home + b->bytes, memory_page_bytes());
    if (end > start)
        (void)memory_guard((void *)start, end - start);
}

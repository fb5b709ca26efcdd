/* The reading threads. */
#define _GNU_SOURCE
#include "pager_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"
#include "memory.h"
#include "monotonic.h"

void pager_wake_readers_locked(pager *p, size_t pieces)
{
    if (pieces >= p->idle) {
        p->idle = 0;
        pthread_cond_broadcast(&p->work);
        return;
    }
    p->idle -= (unsigned)pieces;
    while (pieces-- > 0)
        pthread_cond_signal(&p->work);
}

/* What is waited for comes first, then what is read ahead because it is sure to be used, then guesses. */
static bool next_chunk(pager *p, pager_chunk *c)
{
    if (p->paused || p->error != 0)
        return false;
    return (p->experts != NULL && experts_next_chunk(p->experts, p->chunk_bytes, c, true)) ||
           pager_next_in_order(p, c) ||
           (p->experts != NULL && experts_next_chunk(p->experts, p->chunk_bytes, c, false));
}

/* Reads a piece to its place. Where that place is not the same within a block of the disk as the file's, it goes
   through `bounce`, which holds a piece and the blocks around it. */
static int read_chunk(pager *p, const pager_chunk *c, uint8_t *bounce)
{
    source *file = &p->sources[c->source];
    if (((uintptr_t)c->to - c->offset) % p->alignment == 0)
        return source_read(file, c->to, c->offset, c->length, c->needed);
    uint64_t start = round_down(c->offset, p->alignment);
    size_t length = (size_t)(round_up(c->offset + c->length, p->alignment) - start);
    int error = source_read(file, bounce, start, length, (size_t)(c->offset + c->needed - start));
    if (error == 0)
        memcpy(c->to, bounce + (c->offset - start), c->needed);
    return error;
}

static void complete_chunk(pager *p, const pager_chunk *c)
{
    p->statistics.read_bytes += c->length;
    if (c->resident)
        p->statistics.resident_bytes += c->length;
    c->transfer->completed += c->length;
    if (c->transfer->completed == c->total)
        c->transfer->state = TRANSFER_READY;
    if (c->slot != NULL && !experts_awaited(p->experts))
        return;
    bool slot_is_quiet = c->slot != NULL && c->slot->in_flight == 0; /* it may be wanted for another expert */
    if (c->transfer->state == TRANSFER_READY || p->in_flight == 0 || slot_is_quiet)
        pthread_cond_broadcast(&p->ready);
}

static void *reading_thread(void *argument)
{
    pager *p = argument;
    pager_chunk c;
    uint8_t *bounce = p->experts != NULL ? memory_allocate(p->chunk_bytes + 2 * p->alignment) : NULL;
    pthread_mutex_lock(&p->lock);
    if (p->experts != NULL && bounce == NULL)
        pager_fail_locked(p, ENOMEM, "no memory for reading experts");
    while (!p->stopping) {
        if (!next_chunk(p, &c)) {
            p->idle++;
            pthread_cond_wait(&p->work, &p->lock);
            continue;
        }
        if (p->in_flight++ == 0)
            p->busy_since_ns = now_ns();
        pthread_mutex_unlock(&p->lock);
        int error = read_chunk(p, &c, bounce);
        pthread_mutex_lock(&p->lock);
        if (--p->in_flight == 0)
            p->statistics.busy_ns += now_ns() - p->busy_since_ns;
        if (c.slot != NULL)
            c.slot->in_flight--;
        if (c.guess)
            p->experts->guesses_in_flight--;
        if (error != 0)
            pager_fail_read_locked(p, error, c.source, c.wanted_offset, c.wanted_bytes);
        else
            complete_chunk(p, &c);
    }
    pthread_mutex_unlock(&p->lock);
    memory_free(bounce, p->chunk_bytes + 2 * p->alignment);
    return NULL;
}

int pager_start(pager *p, size_t num_threads)
{
    p->threads = calloc(num_threads, sizeof *p->threads);
    if (p->threads == NULL)
        return num_threads ? ENOMEM : EINVAL;
    for (size_t i = 0; i < num_threads; i++) {
        int error = pthread_create(&p->threads[i], NULL, reading_thread, p);
        if (error != 0)
            return error;
        p->num_threads++;
    }
    return 0;
}

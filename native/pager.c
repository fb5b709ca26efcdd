#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"
#include "memory.h"
#include "monotonic.h"

/* ---- failure ------------------------------------------------------------------------------------------------ */

void pager_fail_locked(pager *p, int error, const char *text)
{
    if (p->error == 0) {
        p->error = error;
        snprintf(p->error_text, sizeof p->error_text, "%s", text);
    }
    atomic_store_explicit(&p->halted, true, memory_order_relaxed);
    pthread_cond_broadcast(&p->ready);
    pager_wake_readers_locked(p, SIZE_MAX);
}

void pager_fail_read_locked(pager *p, int error, uint32_t source_number, uint64_t offset, uint64_t bytes)
{
    char text[PAGER_TEXT_BYTES];
    const char *path = p->sources[source_number].path;
    unsigned long long from = offset, to = offset + bytes;
    if (error == ENODATA)
        snprintf(text, sizeof text, "expected bytes %llu to %llu, the file ends before: %s", from, to, path);
    else
        snprintf(text, sizeof text, "reading bytes %llu to %llu failed (error %d): %s", from, to, error, path);
    pager_fail_locked(p, error, text);
}

void pager_fail(pager *p, int error, const char *text)
{
    pthread_mutex_lock(&p->lock);
    pager_fail_locked(p, error, text);
    pthread_mutex_unlock(&p->lock);
}

void pager_abort(pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->aborted = true;
    atomic_store_explicit(&p->halted, true, memory_order_relaxed);
    pthread_cond_broadcast(&p->ready);
    pthread_mutex_unlock(&p->lock);
}

/* ---- life --------------------------------------------------------------------------------------------------- */

static int refuse(pager *p, int error, const char *what, size_t number, const char *why)
{
    snprintf(p->error_text, sizeof p->error_text, "%s %zu %s", what, number, why);
    return p->error = error;
}

static int check_layout(pager *p)
{
    for (size_t i = 0; i < p->num_blocks; i++) {
        block *b = &p->blocks[i];
        if (b->source >= p->num_sources)
            return refuse(p, EINVAL, "block", i, "is of a source that was not given");
        if (b->kind > BLOCK_ROWS)
            return refuse(p, EINVAL, "block", i, "is of an unknown kind");
        uint64_t size = (uint64_t)p->sources[b->source].size;
        if (b->bytes == 0 || b->offset > size || b->bytes > size - b->offset)
            return refuse(p, EINVAL, "block", i, "is empty or does not lie inside its file");
        memset(&b->resident, 0, sizeof b->resident);
        if (b->kind == BLOCK_STREAMED) {
            b->start = round_down(b->offset, p->alignment);
            b->span = (size_t)(round_up(b->offset + b->bytes, p->alignment) - b->start);
            if (b->span > p->ring_bytes)
                return refuse(p, ENOSPC, "block", i, "does not fit into the ring");
            continue;
        }
        if (b->home == NULL || ((uintptr_t)b->home - b->offset) % p->alignment != 0)
            return refuse(p, EINVAL, "block", i, "has a home that is not at its place in a page");
        b->start = b->offset;
        b->span = (size_t)b->bytes;
        b->resident.to = b->home;
    }
    for (size_t i = 0; i < p->num_uses; i++) {
        if (p->uses[i].block >= p->num_blocks || p->blocks[p->uses[i].block].kind == BLOCK_ROWS)
            return refuse(p, EINVAL, "use", i, "of the order is of a block that was not given, or that is read by rows");
        memset(&p->uses[i].streamed, 0, sizeof p->uses[i].streamed);
        p->uses[i].ring_end = 0;
    }
    return 0;
}

int pager_init(pager *p, source *sources, size_t num_sources, block *blocks, size_t num_blocks, use *uses,
               size_t num_uses, uint8_t *ring, size_t ring_bytes, size_t chunk_bytes)
{
    memset(p, 0, sizeof *p);
    p->sources = sources;
    p->num_sources = num_sources;
    p->blocks = blocks;
    p->num_blocks = num_blocks;
    p->uses = uses;
    p->num_uses = num_uses;
    p->ring = ring;
    p->alignment = memory_page_bytes();
    for (size_t i = 0; i < num_sources; i++)
        if (sources[i].alignment > p->alignment)
            p->alignment = sources[i].alignment;
    p->ring_bytes = (size_t)round_down(ring_bytes, p->alignment);
    p->chunk_bytes = (size_t)round_up(chunk_bytes ? chunk_bytes : 1, p->alignment);
    atomic_init(&p->halted, false);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, NULL);
    pthread_cond_init(&p->ready, NULL);
    return check_layout(p);
}

void pager_destroy(pager *p)
{
    pthread_mutex_lock(&p->lock);
    p->stopping = true;
    pager_wake_readers_locked(p, SIZE_MAX);
    pthread_mutex_unlock(&p->lock);
    for (size_t i = 0; i < p->num_threads; i++)
        pthread_join(p->threads[i], NULL);
    for (size_t i = 0; i < p->num_sources; i++)
        source_close(&p->sources[i]);
    free(p->sources);
    free(p->blocks);
    free(p->uses);
    free(p->threads);
    experts_free(p->experts);
    pthread_cond_destroy(&p->ready);
    pthread_cond_destroy(&p->work);
    pthread_mutex_destroy(&p->lock);
    memset(p, 0, sizeof *p);
}

void pager_copy_statistics(pager *p, pager_statistics *out)
{
    pthread_mutex_lock(&p->lock);
    *out = p->statistics;
    if (p->num_uses > 0)
        out->pass_fraction = (double)(p->cursor % p->num_uses) / (double)p->num_uses;
    if (p->in_flight > 0)
        out->busy_ns += now_ns() - p->busy_since_ns;
    pthread_mutex_unlock(&p->lock);
}

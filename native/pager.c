#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "experts.h"
#include "memory.h"

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static use *use_at(pager *p, uint64_t number) { return &p->uses[number % p->num_uses]; }
static block *block_of(pager *p, const use *u) { return &p->blocks[u->block]; }

static transfer *transfer_of(pager *p, use *u)
{
    block *b = block_of(p, u);
    return b->kind == BLOCK_RESIDENT ? &b->resident : &u->streamed;
}

/* ---- failure ------------------------------------------------------------------------------------------------ */

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

/* ---- the ring ----------------------------------------------------------------------------------------------- */

/* Uses are taken and given back in the same order, so free space is one stretch behind the head. A use gets its place
   before all of it is free: it is filled piece by piece, as the uses before it are given back. */
static void ring_place(pager *p, use *u)
{
    size_t span = block_of(p, u)->span;
    if (p->ring_head == p->ring_tail) /* empty: start at the front, so that anything up to the whole ring fits */
        p->ring_head = p->ring_tail = round_up(p->ring_head, p->ring_bytes);
    size_t place = (size_t)(p->ring_head % p->ring_bytes);
    if (place + span > p->ring_bytes) { /* what is left at the end goes free with the use before it */
        p->ring_head += p->ring_bytes - place;
        if (p->last_placed != NULL)
            p->last_placed->ring_end = p->ring_head;
    }
    if (p->ring_head / p->ring_bytes > p->statistics.ring_wraps)
        p->statistics.ring_wraps = p->ring_head / p->ring_bytes;
    u->streamed.to = p->ring + p->ring_head % p->ring_bytes;
    u->ring_begin = p->ring_head;
    u->ring_end = p->ring_head += span;
    p->last_placed = u;
}

/* Bytes of the next piece of a use that is placed. */
static size_t piece_bytes(const pager *p, const block *b, const transfer *t)
{
    size_t left = b->span - t->issued;
    size_t limit = p->chunk_bytes - (size_t)((b->start + t->issued) % p->alignment); /* the next one starts a page */
    return left < limit ? left : limit;
}

/* Whether nothing that is still held lies where the next piece of this use goes. */
static bool piece_is_free(pager *p, use *u)
{
    block *b = block_of(p, u);
    uint64_t end = u->ring_begin + u->streamed.issued + piece_bytes(p, b, &u->streamed);
    return end - p->ring_tail <= p->ring_bytes;
}

static void begin_transfer(pager *p, use *u)
{
    transfer *t = transfer_of(p, u);
    if (block_of(p, u)->kind == BLOCK_STREAMED)
        ring_place(p, u);
    t->state = TRANSFER_READING;
    t->issued = t->completed = 0;
}

/* ---- reading ahead ------------------------------------------------------------------------------------------ */

/* Goes on to the next use of which something is still to be fetched. false: there is none in the window. */
static bool find_next_in_order(pager *p)
{
    for (; p->fetch < p->released + p->num_uses; p->fetch++) {
        use *u = use_at(p, p->fetch);
        transfer *t = transfer_of(p, u);
        if (t->state == TRANSFER_IDLE || t->issued < block_of(p, u)->span) /* not one that is here or under way */
            return true;
    }
    return false;
}

/* The next piece of the order of use. false: nothing of it can be fetched now. */
static bool next_in_order(pager *p, pager_chunk *c)
{
    if (find_next_in_order(p)) {
        use *u = use_at(p, p->fetch);
        block *b = block_of(p, u);
        transfer *t = transfer_of(p, u);
        if (t->state == TRANSFER_IDLE)
            begin_transfer(p, u);
        if (b->kind == BLOCK_STREAMED && !piece_is_free(p, u))
            return false;
        uint64_t offset = b->start + t->issued, end = b->offset + b->bytes;
        size_t length = piece_bytes(p, b, t);
        *c = (pager_chunk){.source = b->source, .transfer = t, .total = b->span, .to = t->to + t->issued,
                           .offset = offset, .length = length, .resident = b->kind == BLOCK_RESIDENT,
                           .wanted_offset = b->offset, .wanted_bytes = b->bytes,
                           .needed = offset + length <= end ? length : (size_t)(end - offset)};
        t->issued += length;
        if (t->issued == b->span)
            p->fetch++;
        return true;
    }
    return false;
}

/* What is waited for comes first, then what is read ahead because it is sure to be used, then guesses. */
static bool next_chunk(pager *p, pager_chunk *c)
{
    if (p->paused || p->error != 0)
        return false;
    return (p->experts != NULL && experts_next_chunk(p->experts, p->chunk_bytes, c, true)) || next_in_order(p, c) ||
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

/* Forgets what was fetched for `from` and later uses; reading goes on at `next`. The lock is held. */
static void drop_fetched(pager *p, uint64_t from, uint64_t next)
{
    p->paused = true;
    while (p->in_flight > 0)
        pthread_cond_wait(&p->ready, &p->lock);
    uint64_t last = p->fetch;
    for (uint64_t i = from; i <= last && i < p->released + p->num_uses; i++) { /* further on they are the held ones */
        use *u = use_at(p, i);
        transfer *t = transfer_of(p, u);
        bool partial = t->state == TRANSFER_READING && t->issued < block_of(p, u)->span;
        if (block_of(p, u)->kind == BLOCK_STREAMED || partial)
            t->state = TRANSFER_IDLE;
    }
    uint64_t end = p->ring_tail; /* keep what is acquired */
    p->last_placed = NULL;
    for (uint64_t i = p->released; i < from; i++)
        if (block_of(p, use_at(p, i))->kind == BLOCK_STREAMED && use_at(p, i)->streamed.state != TRANSFER_IDLE) {
            p->last_placed = use_at(p, i);
            end = p->last_placed->ring_end;
        }
    p->ring_head = end;
    p->fetch = p->cursor = next;
    p->paused = false;
    pager_wake_readers_locked(p, SIZE_MAX);
}

/* ---- passes ------------------------------------------------------------------------------------------------- */

static bool sources_unchanged_locked(pager *p)
{
    for (size_t i = 0; i < p->num_sources; i++)
        if (!source_unchanged(&p->sources[i])) {
            char text[PAGER_TEXT_BYTES];
            snprintf(text, sizeof text, "changed, replaced or removed while in use: %s", p->sources[i].path);
            pager_fail_locked(p, ESTALE, text);
            return false;
        }
    return true;
}

static void release_locked(pager *p)
{
    bool freed = p->fetch >= p->released + p->num_uses; /* reading ahead stood at the end of its window */
    for (; p->released < p->cursor; p->released++) {
        use *u = use_at(p, p->released);
        if (block_of(p, u)->kind != BLOCK_STREAMED || u->streamed.state != TRANSFER_READY)
            continue;
        u->streamed.state = TRANSFER_IDLE;
        p->ring_tail = u->ring_end;
        freed = true;
    }
    if (freed && find_next_in_order(p))
        pager_wake_readers_locked(p, SIZE_MAX);
}

bool pager_begin_pass(pager *p)
{
    pthread_mutex_lock(&p->lock);
    bool good = p->error == 0 && sources_unchanged_locked(p);
    if (good) {
        if (p->aborted && p->experts != NULL)
            experts_reset(p->experts);
        p->aborted = false;
        atomic_store_explicit(&p->halted, false, memory_order_relaxed);
        release_locked(p);
        if (p->num_uses > 0 && p->cursor % p->num_uses != 0) {
            uint64_t next = round_up(p->cursor, p->num_uses);
            drop_fetched(p, p->cursor, next);
            p->released = next;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return good;
}

bool pager_end_pass(pager *p)
{
    pthread_mutex_lock(&p->lock);
    release_locked(p);
    bool good = p->error == 0 && sources_unchanged_locked(p);
    p->statistics.passes += good && !p->aborted;
    pthread_mutex_unlock(&p->lock);
    return good;
}

/* Waits until this use's block is in memory. The lock is held. */
static bool wait_for(pager *p, uint64_t number)
{
    transfer *t = transfer_of(p, use_at(p, number));
    if (t->state == TRANSFER_READY)
        return !pager_halted(p);
    uint64_t start = now_ns();
    while (t->state != TRANSFER_READY && !pager_halted(p)) {
        use *u = use_at(p, number);
        if (p->fetch == number && t->state == TRANSFER_IDLE)
            begin_transfer(p, u);
        /* Everything before it is acquired: what does not fit now will not fit later. */
        if (p->fetch == number && p->in_flight == 0 && block_of(p, u)->kind == BLOCK_STREAMED && !piece_is_free(p, u)) {
            pager_fail_locked(p, ENOBUFS, "a weight was needed out of order and the ring is too small to hold it as well");
            break;
        }
        pthread_cond_wait(&p->ready, &p->lock);
    }
    p->statistics.wait_ns += now_ns() - start;
    p->statistics.waits++;
    return !pager_halted(p);
}

/* Where a block is in memory although its next use is not the next one: resident, or not given back yet. */
static transfer *find_present(pager *p, uint32_t wanted)
{
    transfer *resident = &p->blocks[wanted].resident;
    if (resident->state == TRANSFER_READY)
        return resident;
    for (uint64_t i = p->released; i < p->cursor; i++) {
        use *u = use_at(p, i);
        if (u->block == wanted && u->streamed.state == TRANSFER_READY)
            return &u->streamed;
    }
    return NULL;
}

/* Uses that were passed by unread, or are of resident blocks, hold nothing: the window moves over them. */
static void skip_released_locked(pager *p)
{
    uint64_t before = p->released;
    while (p->released < p->cursor && use_at(p, p->released)->streamed.state != TRANSFER_READY)
        p->released++;
    if (p->released != before)
        pager_wake_readers_locked(p, SIZE_MAX);
}

/* Moves the cursor to the next use of this block. The lock is held. */
static bool seek_block(pager *p, uint32_t wanted)
{
    skip_released_locked(p);
    for (uint64_t skipped = 0; skipped < p->num_uses; skipped++) {
        uint64_t target = p->cursor + skipped;
        if (use_at(p, target)->block != wanted)
            continue;
        if (target >= p->released + p->num_uses) {
            pager_fail_locked(p, ENOBUFS, "a weight was needed that comes a whole pass after one that is still in use");
            return false;
        }
        if (skipped == 0)
            return true;
        p->statistics.reorders++;
        if (target >= p->fetch) {
            drop_fetched(p, p->cursor, target);
            return true;
        }
        for (uint64_t i = p->cursor; i < target; i++) /* already read or being read: let it arrive, then pass it by */
            if (!wait_for(p, i))
                return false;
        p->cursor = target;
        return true;
    }
    pager_fail_locked(p, EINVAL, "a block was asked for that is not in the order of use");
    return false;
}

bool pager_acquire(pager *p, uint32_t wanted, uint8_t **address, bool *next_ready)
{
    pthread_mutex_lock(&p->lock);
    const block *b = &p->blocks[wanted];
    transfer *t = NULL;
    bool good = !pager_halted(p);
    bool in_order = p->cursor < p->released + p->num_uses && use_at(p, p->cursor)->block == wanted;
    if (good && !in_order)
        t = find_present(p, wanted);
    if (t != NULL) {
        p->statistics.reorders++;
    } else if (good) {
        good = seek_block(p, wanted) && wait_for(p, p->cursor);
        t = good ? transfer_of(p, use_at(p, p->cursor++)) : NULL;
    }
    if (good) {
        *address = t->to + (b->offset - b->start);
        *next_ready = p->cursor % p->num_uses == 0 ||
                      transfer_of(p, use_at(p, p->cursor))->state == TRANSFER_READY;
    }
    pthread_mutex_unlock(&p->lock);
    return good;
}

bool pager_wait_next(pager *p)
{
    pthread_mutex_lock(&p->lock);
    bool good = !pager_halted(p);
    bool can_come = p->cursor < p->released + p->num_uses; /* otherwise it waits for pager_release */
    if (good && can_come && p->cursor % p->num_uses != 0)
        good = wait_for(p, p->cursor);
    pthread_mutex_unlock(&p->lock);
    return good;
}

void pager_release(pager *p)
{
    pthread_mutex_lock(&p->lock);
    release_locked(p);
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

/* Passes: the uses of blocks are acquired in their order, or out of it, and given back. */
#define _GNU_SOURCE
#include "pager_internal.h"

#include <errno.h>
#include <stdio.h>

#include "experts.h"
#include "memory.h"
#include "monotonic.h"

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
    if (freed && pager_find_next_in_order(p))
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
            pager_drop_fetched(p, p->cursor, next);
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
            pager_begin_transfer(p, u);
        /* Everything before it is acquired: what does not fit now will not fit later. */
        if (p->fetch == number && p->in_flight == 0 && block_of(p, u)->kind == BLOCK_STREAMED && !pager_piece_is_free(p, u)) {
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
            pager_drop_fetched(p, p->cursor, target);
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

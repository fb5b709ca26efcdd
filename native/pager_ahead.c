/* Reading ahead in the order of use: which piece is fetched next, and its place in the ring. */
#include "pager_internal.h"

#include "memory.h"

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

bool pager_piece_is_free(pager *p, use *u)
{
    block *b = block_of(p, u);
    uint64_t end = u->ring_begin + u->streamed.issued + piece_bytes(p, b, &u->streamed);
    return end - p->ring_tail <= p->ring_bytes;
}

void pager_begin_transfer(pager *p, use *u)
{
    transfer *t = transfer_of(p, u);
    if (block_of(p, u)->kind == BLOCK_STREAMED)
        ring_place(p, u);
    t->state = TRANSFER_READING;
    t->issued = t->completed = 0;
}

/* ---- the window --------------------------------------------------------------------------------------------- */

bool pager_find_next_in_order(pager *p)
{
    for (; p->fetch < p->released + p->num_uses; p->fetch++) {
        use *u = use_at(p, p->fetch);
        transfer *t = transfer_of(p, u);
        if (t->state == TRANSFER_IDLE || t->issued < block_of(p, u)->span) /* not one that is here or under way */
            return true;
    }
    return false;
}

bool pager_next_in_order(pager *p, pager_chunk *c)
{
    if (pager_find_next_in_order(p)) {
        use *u = use_at(p, p->fetch);
        block *b = block_of(p, u);
        transfer *t = transfer_of(p, u);
        if (t->state == TRANSFER_IDLE)
            pager_begin_transfer(p, u);
        if (b->kind == BLOCK_STREAMED && !pager_piece_is_free(p, u))
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

void pager_drop_fetched(pager *p, uint64_t from, uint64_t next)
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

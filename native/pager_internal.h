/* What the files of the pager share. The lock is held. */
#ifndef EDGEINFER_PAGER_INTERNAL_H
#define EDGEINFER_PAGER_INTERNAL_H

#include "pager.h"

static inline use *use_at(pager *p, uint64_t number) { return &p->uses[number % p->num_uses]; }
static inline block *block_of(pager *p, const use *u) { return &p->blocks[u->block]; }

static inline transfer *transfer_of(pager *p, use *u)
{
    block *b = block_of(p, u);
    return b->kind == BLOCK_RESIDENT ? &b->resident : &u->streamed;
}

/* Gives a use its place, before its first piece is fetched. */
void pager_begin_transfer(pager *p, use *u);
/* Whether nothing that is still held lies where the next piece of this use goes. */
bool pager_piece_is_free(pager *p, use *u);

/* Goes on to the next use of which something is still to be fetched. false: there is none in the window. */
bool pager_find_next_in_order(pager *p);
/* The next piece of the order of use. false: nothing of it can be fetched now. */
bool pager_next_in_order(pager *p, pager_chunk *c);
/* Forgets what was fetched for `from` and later uses, once no read is in flight; reading goes on at `next`. */
void pager_drop_fetched(pager *p, uint64_t from, uint64_t next);

#endif

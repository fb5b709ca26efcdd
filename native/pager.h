/* The pager: brings blocks of files into memory in a known, cyclic order of use, ahead of their use.

   A block is a range of a file. A RESIDENT block is read once, to its home, and stays. A STREAMED block is read for
   every use into a ring and given back after it. A ROWS block is a table at its home of which only the rows that a
   pass asks for are brought in. The order lists the uses of one pass; reading runs ahead through it, over the end of
   the pass into the next, as far as the ring allows. One thread acquires and releases; any thread may halt.

   Knows nothing of Python or of tensors. */
#ifndef EDGEINFER_PAGER_H
#define EDGEINFER_PAGER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "source.h"

#define PAGER_TEXT_BYTES 512

typedef enum { BLOCK_RESIDENT = 0, BLOCK_STREAMED = 1, BLOCK_ROWS = 2 } block_kind;

typedef enum { TRANSFER_IDLE = 0, TRANSFER_READING, TRANSFER_READY } transfer_state;

/* One reading of a block: `span` bytes of the file from `start` go to `to`. */
typedef struct {
    transfer_state state;
    uint8_t *to;
    size_t issued, completed;
} transfer;

struct expert_cache;
struct expert_slot;

/* A piece that one thread reads. */
typedef struct {
    uint32_t source;
    transfer *transfer;
    size_t total; /* of the transfer */
    uint8_t *to;
    uint64_t offset;
    size_t length, needed; /* the rest may lie past the end of the file */
    uint64_t wanted_offset, wanted_bytes; /* what it is a piece of, for messages */
    bool resident;
    struct expert_slot *slot; /* NULL: not of an expert */
    bool guess;               /* of one that may not be wanted */
} pager_chunk;

typedef struct {
    uint32_t source;
    block_kind kind;
    uint64_t offset, bytes; /* what is wanted */
    uint64_t start;         /* what is read: streamed, the aligned range around it; else exactly it, for the rest of */
    size_t span;            /* its first and last page belongs to its neighbours */
    uint8_t *home;          /* where byte `offset` lives when resident; NULL for a block that is only streamed */
    transfer resident;
} block;

typedef struct {
    uint32_t block;
    transfer streamed;
    uint64_t ring_begin, ring_end; /* positions in the ring: of its place, and behind what goes free with it */
} use;

typedef struct {
    uint64_t read_bytes;     /* by the reading threads, rounding to blocks of the disk included */
    uint64_t resident_bytes; /* of them, into resident blocks */
    uint64_t row_bytes;      /* read for rows */
    uint64_t wait_ns;        /* the acquiring thread stood still */
    uint64_t waits;
    uint64_t busy_ns;        /* at least one read was in flight */
    uint64_t passes;         /* that ended without being aborted */
    uint64_t ring_wraps;     /* the ring began again at its front */
    uint64_t reorders;       /* blocks asked for out of order */
    double pass_fraction;    /* uses acquired of the current pass */
} pager_statistics;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work;  /* reading threads: something may be fetched */
    pthread_cond_t ready; /* acquiring thread: a transfer ended, or the pager halted */

    source *sources;
    size_t num_sources;
    block *blocks;
    size_t num_blocks;
    use *uses;
    size_t num_uses;
    uint8_t *ring;
    size_t ring_bytes, chunk_bytes, alignment;
    uint64_t ring_head, ring_tail; /* positions that only grow; modulo ring_bytes they are places */
    use *last_placed;              /* NULL: nothing in the ring */

    uint64_t released, cursor, fetch; /* numbers of uses, over all passes: released <= cursor <= fetch, or so */
    unsigned in_flight;
    unsigned idle; /* reading threads that sleep and were not woken yet */
    bool paused, stopping, aborted;
    atomic_bool halted; /* aborted or failed: readable without the lock */
    int error;          /* errno of the first failure, sticky */
    char error_text[PAGER_TEXT_BYTES];

    struct expert_cache *experts; /* NULL: none; given before pager_start, freed with the pager */

    pager_statistics statistics;
    uint64_t busy_since_ns;
    pthread_t *threads;
    size_t num_threads;
} pager;

/* Takes over `sources` (opened), `blocks` and `uses` (malloc'ed; of them only source, kind, offset, bytes and home,
   and block, need to be set). The ring belongs to the caller and outlives the pager. 0 or an errno,
   with p->error_text. */
int pager_init(pager *p, source *sources, size_t num_sources, block *blocks, size_t num_blocks, use *uses,
               size_t num_uses, uint8_t *ring, size_t ring_bytes, size_t chunk_bytes);
/* Starts the reading threads. 0 or an errno. */
int pager_start(pager *p, size_t num_threads);
/* Stops the threads, closes the files, frees what was taken over. */
void pager_destroy(pager *p);

/* A pass begins at the first use of the order, whatever the last one did. false: failed, see pager->error. */
bool pager_begin_pass(pager *p);
/* The pass is computed. false: what it read may be wrong (the file changed, a read failed). */
bool pager_end_pass(pager *p);

/* Waits until the block of this use is in memory; *address is its first byte until pager_release. *next_ready tells
   whether the next use of this pass needs no waiting. false: failed or aborted. */
bool pager_acquire(pager *p, uint32_t block, uint8_t **address, bool *next_ready);
/* Waits for the next use of this pass, without acquiring it. */
bool pager_wait_next(pager *p);
/* Gives back everything that was acquired. */
void pager_release(pager *p);

/* Brings rows of a ROWS block to their places; `rows`: int32, aligned or not. Returns 0 or an errno (which is sticky). */
int pager_open_rows(pager *p, uint32_t block, size_t row_bytes, const void *rows, size_t num_rows);
void pager_close_rows(pager *p, uint32_t block);

/* Wakes as many reading threads as there are new pieces: each one that finds nothing to do takes a processor from the
   computing. The lock is held. */
void pager_wake_readers_locked(pager *p, size_t pieces);

/* Makes waits end and passes fail until the next pager_begin_pass. */
void pager_abort(pager *p);
/* Records a failure that is not the pager's own; sticky. */
void pager_fail(pager *p, int error, const char *text);
void pager_fail_locked(pager *p, int error, const char *text);
void pager_fail_read_locked(pager *p, int error, uint32_t source, uint64_t offset, uint64_t bytes);
static inline bool pager_halted(pager *p) { return atomic_load_explicit(&p->halted, memory_order_relaxed); }

void pager_copy_statistics(pager *p, pager_statistics *out);

#endif

/* The pager without Python, under sanitizers: `stress FILE SECONDS SEED` writes FILE and runs passes over it with random
   blocks, rings, chunks, threads and orders of use, aborted from a second thread, and compares every byte. */
#define _GNU_SOURCE
#include "stress_common.h"

enum { FILE_PAGES = 48, MAX_BLOCKS = 24, MAX_USES = 40 };

/* ---- one pager ---------------------------------------------------------------------------------------------- */

typedef struct {
    pager pager;
    uint8_t *space, *ring;
    size_t ring_bytes;
    uint32_t blocks, uses, table; /* table: a block of rows, or `blocks` */
    block described[MAX_BLOCKS];
    uint32_t order[MAX_USES];
} round_state;

/* Neighbours that share pages, a part of them resident, and one table; overlapping streamed blocks at random. */
static void choose_blocks(round_state *r)
{
    size_t page = memory_page_bytes(), at = 0;
    r->blocks = 0;
    r->table = MAX_BLOCKS;
    while (at < truth_bytes && r->blocks < MAX_BLOCKS - 4) {
        size_t bytes = 1 + below(below(3) ? 5 * (unsigned)page : 100);
        bytes = bytes < truth_bytes - at ? bytes : truth_bytes - at;
        block_kind kind = below(2) ? BLOCK_STREAMED : BLOCK_RESIDENT;
        if (r->table == MAX_BLOCKS && r->blocks == 3) {
            kind = BLOCK_ROWS;
            r->table = r->blocks;
        }
        r->described[r->blocks++] = (block){.kind = kind, .offset = at, .bytes = bytes, .home = r->space + at};
        at += bytes;
    }
    while (r->blocks < MAX_BLOCKS) {
        size_t offset = below((unsigned)truth_bytes), bytes = 1 + below(6 * (unsigned)page);
        bytes = bytes < truth_bytes - offset ? bytes : truth_bytes - offset;
        r->described[r->blocks++] = (block){.kind = BLOCK_STREAMED, .offset = offset, .bytes = bytes};
    }
    r->uses = 1 + below(MAX_USES);
    for (uint32_t i = 0; i < r->uses; i++)
        do
            r->order[i] = below(r->blocks);
        while (r->order[i] == r->table);
}

static void open_round(round_state *r)
{
    size_t page = memory_page_bytes(), largest = 0;
    memset(r, 0, sizeof *r);
    r->space = memory_allocate(truth_bytes + page);
    choose_blocks(r);
    for (uint32_t i = 0; i < r->blocks; i++)
        if (r->described[i].kind == BLOCK_STREAMED && r->described[i].bytes > largest)
            largest = r->described[i].bytes;
    r->ring_bytes = round_up(largest, page) + (1 + below(12)) * page;
    r->ring = memory_allocate(r->ring_bytes);
    source *sources = calloc(1, sizeof *sources);
    block *blocks = calloc(r->blocks, sizeof *blocks);
    use *uses = calloc(r->uses, sizeof *uses);
    if (!r->space || !r->ring || !sources || !blocks || !uses || source_open(sources, path, below(4) != 0) != 0)
        fail("setting up", (unsigned long long)errno);
    memcpy(blocks, r->described, r->blocks * sizeof *blocks);
    for (uint32_t i = 0; i < r->uses; i++)
        uses[i].block = r->order[i];
    int error = pager_init(&r->pager, sources, 1, blocks, r->blocks, uses, r->uses, r->ring, r->ring_bytes,
                           1 + below(4 * (unsigned)page));
    if (error == 0)
        error = pager_start(&r->pager, 1 + below(4));
    if (error != 0)
        fail(r->pager.error_text, (unsigned long long)error);
}

static void close_round(round_state *r)
{
    pager_destroy(&r->pager);
    memory_free(r->ring, r->ring_bytes);
    memory_free(r->space, truth_bytes + memory_page_bytes());
}

static void compare(const round_state *r, uint32_t number, const uint8_t *address)
{
    const block *b = &r->described[number];
    if (memcmp(address, truth + b->offset, b->bytes) != 0)
        fail("wrong bytes in block", number);
}

static void use_rows(round_state *r)
{
    const block *b = &r->described[r->table];
    size_t row_bytes = 1 + below((unsigned)b->bytes);
    int32_t rows[5];
    for (int i = 0; i < 5; i++)
        rows[i] = (int32_t)below((unsigned)(b->bytes / row_bytes));
    if (pager_open_rows(&r->pager, r->table, row_bytes, rows, 5) != 0)
        fail(r->pager.error_text, r->table);
    for (int i = 0; i < 5; i++)
        if (memcmp(b->home + (size_t)rows[i] * row_bytes, truth + b->offset + (size_t)rows[i] * row_bytes, row_bytes))
            fail("wrong bytes in row", (unsigned long long)rows[i]);
    pager_close_rows(&r->pager, r->table);
}

/* One pass. false: the ring was too small for what was held at once, which a random order may ask for. */
static bool run_pass(round_state *r, aborter *a, uint64_t *acquired)
{
    uint32_t held[3];
    uint8_t *places[3];
    unsigned num_held = 0, keep = 0;
    atomic_store(&a->may_abort, below(3) == 0);
    if (!pager_begin_pass(&r->pager))
        fail(r->pager.error_text, 0);
    if (r->table < r->blocks)
        use_rows(r);
    for (uint32_t i = 0; i < r->uses; i++) {
        bool next_ready;
        uint32_t wanted = below(12) == 0 ? r->order[below(r->uses)] : r->order[i];
        if (!pager_acquire(&r->pager, wanted, &places[num_held], &next_ready))
            break;
        held[num_held] = wanted;
        num_held++;
        for (unsigned j = 0; j < num_held; j++)
            compare(r, held[j], places[j]);
        ++*acquired;
        if (keep == 0 || num_held == 3) {
            keep = below(25) == 0 ? 1 + below(2) : 0;
            pager_release(&r->pager);
            num_held = 0;
            if (!next_ready && !pager_wait_next(&r->pager))
                break;
        } else {
            keep--;
        }
        if (below(60) == 0)
            break;
    }
    atomic_store(&a->may_abort, false);
    if (pager_end_pass(&r->pager))
        return true;
    if (r->pager.error != ENOBUFS)
        fail(r->pager.error_text, (unsigned long long)r->pager.error);
    return false;
}

int main(int argc, char **argv)
{
    double end = begin(argc, argv, FILE_PAGES);
    uint64_t rounds = 0, passes = 0, acquired = 0, read_bytes = 0, refused = 0;
    while (now() < end) {
        static round_state r;
        open_round(&r);
        aborter a;
        start_aborter(&a, &r.pager);
        bool good = true;
        for (int i = 0; i < 30 && good && now() < end; i++)
            good = run_pass(&r, &a, &acquired);
        stop_aborter(&a);
        pager_statistics s;
        pager_copy_statistics(&r.pager, &s);
        passes += s.passes;
        read_bytes += s.read_bytes;
        refused += !good;
        rounds++;
        close_round(&r);
    }
    free(truth);
    printf("rounds %llu passes %llu acquired %llu read_bytes %llu refused %llu\n", (unsigned long long)rounds,
           (unsigned long long)passes, (unsigned long long)acquired, (unsigned long long)read_bytes,
           (unsigned long long)refused);
    return 0;
}

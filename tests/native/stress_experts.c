/* The cache of experts without Python, under sanitizers: `stress_experts FILE SECONDS SEED` writes FILE and runs passes
   over caches of random layouts, sizes and policies, as a model of experts does: choices of one token or of many, right
   and wrong predictions, waits, streamed weights between the layers; aborted from a second thread. Every byte of every
   chosen expert is compared, and the cache's books are checked after every pass. */
#define _GNU_SOURCE
#include "stress_common.h"

#include "experts.h"

enum { FILE_PAGES = 320, MAX_LAYERS = 6, MAX_EXPERTS = 16, MAX_KINDS = 2, MAX_TOKENS = 12, MAX_USED = 3 };

static size_t page;

/* ---- one cache ---------------------------------------------------------------------------------------------- */

typedef struct {
    pager pager;
    uint32_t num_layers, num_experts, num_kinds, num_used;
    expert_layer layers[MAX_LAYERS]; /* as they were described */
    expert_kind kinds[MAX_KINDS];
    uint8_t *ring;
    size_t ring_bytes;
    block streamed[MAX_LAYERS]; /* one weight ahead of each layer */
    int32_t ids[MAX_TOKENS * MAX_USED], next_ids[MAX_USED], slots[MAX_TOKENS * MAX_USED];
    size_t num_ids;
} round_state;

typedef struct {
    uint64_t rounds, passes, selections, too_many, aborted, compared, hits, guesses, guesses_used;
} totals;

/* Experts one behind the other, tensors at any byte or at pages; kinds of one to three matrices. */
static void choose_layout(round_state *r)
{
    bool aligned = below(3) == 0;
    r->num_experts = 2 + below(MAX_EXPERTS - 1);
    r->num_layers = 1 + below(MAX_LAYERS);
    r->num_kinds = 1 + below(MAX_KINDS);
    r->num_used = 1 + below(r->num_experts < MAX_USED ? r->num_experts : MAX_USED);
    for (uint32_t k = 0; k < r->num_kinds; k++) {
        expert_kind *kind = &r->kinds[k];
        kind->num_matrices = 1 + below(EXPERT_MATRICES);
        uint32_t most = r->num_layers * r->num_experts;
        kind->num_slots = below(3) == 0 ? r->num_used : 1 + below(most);
        for (uint32_t m = 0; m < kind->num_matrices; m++) {
            kind->bytes[m] = aligned ? page * (1 + below(2)) : 1 + below(below(3) ? 3 * (unsigned)page : 200);
            kind->stride[m] = round_up(kind->bytes[m], page);
            kind->pool[m] = memory_allocate(kind->num_slots * kind->stride[m]);
            if (kind->pool[m] == NULL)
                fail("no memory", 0);
            memset(kind->pool[m], 0xEE, kind->num_slots * kind->stride[m]);
        }
    }
    for (uint32_t l = 0; l < r->num_layers; l++) {
        expert_layer *layer = &r->layers[l];
        layer->kind = below(r->num_kinds);
        layer->num_experts = l == 0 ? r->num_experts : r->num_used + below(r->num_experts - r->num_used + 1);
        for (uint32_t m = 0; m < r->kinds[layer->kind].num_matrices; m++) {
            size_t bytes = layer->num_experts * r->kinds[layer->kind].bytes[m];
            size_t at = below((unsigned)(truth_bytes - bytes) + 1); /* the last ones end with the file now and then */
            layer->source[m] = 0;
            layer->offset[m] = aligned ? round_down(at, page) : at;
        }
    }
}

static void describe_streamed(round_state *r)
{
    size_t largest = 0;
    for (uint32_t l = 0; l < r->num_layers; l++) {
        size_t bytes = 1 + below(3 * (unsigned)page);
        r->streamed[l] = (block){.kind = BLOCK_STREAMED, .offset = below((unsigned)(truth_bytes - bytes)), .bytes = bytes};
        largest = bytes > largest ? bytes : largest;
    }
    r->ring_bytes = 2 * (round_up(largest, page) + page);
    r->ring = memory_allocate(r->ring_bytes);
}

static void give_cache(round_state *r)
{
    uint32_t num_policies = 0, num_keys = r->num_layers * r->num_experts;
    while (policy_names()[num_policies] != NULL)
        num_policies++;
    const char *name = policy_names()[below(num_policies)];
    uint32_t *layer_of = malloc(num_keys * sizeof *layer_of);
    expert_layer *layers = malloc(r->num_layers * sizeof *layers);
    expert_kind *kinds = malloc(r->num_kinds * sizeof *kinds);
    if (!layer_of || !layers || !kinds)
        fail("no memory", 1);
    for (uint32_t key = 0; key < num_keys; key++)
        layer_of[key] = key / r->num_experts;
    memcpy(layers, r->layers, r->num_layers * sizeof *layers);
    memcpy(kinds, r->kinds, r->num_kinds * sizeof *kinds);
    for (uint32_t k = 0; k < r->num_kinds; k++) {
        policy_options options = {.layer = layer_of, .num_layers = r->num_layers};
        kinds[k].policy = policy_new(name, num_keys, kinds[k].num_slots, &options);
        if (kinds[k].policy == NULL)
            fail("no policy", k);
    }
    free(layer_of);
    r->pager.experts = experts_new(layers, r->num_layers, r->num_experts, kinds, r->num_kinds);
    if (r->pager.experts == NULL)
        fail("no cache", 0);
}

static void open_round(round_state *r)
{
    memset(r, 0, sizeof *r);
    choose_layout(r);
    describe_streamed(r);
    bool streams = below(2) == 0;
    source *sources = calloc(1, sizeof *sources);
    block *blocks = calloc(r->num_layers, sizeof *blocks);
    use *uses = calloc(r->num_layers, sizeof *uses);
    if (!r->ring || !sources || !blocks || !uses || source_open(sources, path, below(4) != 0) != 0)
        fail("setting up", (unsigned long long)errno);
    memcpy(blocks, r->streamed, r->num_layers * sizeof *blocks);
    for (uint32_t l = 0; l < r->num_layers; l++)
        uses[l].block = l;
    int error = pager_init(&r->pager, sources, 1, blocks, r->num_layers, uses, streams ? r->num_layers : 0, r->ring,
                           r->ring_bytes, 1 + below(3 * (unsigned)page));
    if (error != 0)
        fail(r->pager.error_text, (unsigned long long)error);
    give_cache(r);
    error = pager_start(&r->pager, 1 + below(4));
    if (error != 0)
        fail("starting threads", (unsigned long long)error);
}

/* Every key that is cached and does not merely pass is known to its policy, exactly once: they can all be drawn. */
static void drain_policies(round_state *r)
{
    expert_cache *cache = r->pager.experts;
    pthread_mutex_lock(&r->pager.lock);
    for (uint32_t k = 0; k < cache->num_kinds; k++) {
        expert_kind *kind = &cache->kinds[k];
        uint32_t known = 0, key;
        for (uint32_t i = 0; i < kind->num_slots; i++)
            known += kind->slots[i].key != EXPERT_NONE && !kind->slots[i].passing;
        while ((key = policy_victim(kind->policy, NULL, NULL)) != POLICY_NONE) {
            uint32_t slot = cache->slot_of_key[key];
            if (known-- == 0 || slot == EXPERT_NONE || kind->slots[slot].passing)
                fail("a policy knows what is not cached", key);
            policy_remove(kind->policy, key);
        }
        if (known != 0)
            fail("a policy does not know so many that are cached:", known);
    }
    pthread_mutex_unlock(&r->pager.lock);
}

static void close_round(round_state *r, totals *sum)
{
    expert_statistics *s = &r->pager.experts->statistics;
    sum->hits += s->hits + s->guess_hits;
    sum->guesses += s->guesses;
    sum->guesses_used += s->guesses_used;
    drain_policies(r);
    pager_destroy(&r->pager);
    for (uint32_t k = 0; k < r->num_kinds; k++)
        for (uint32_t m = 0; m < r->kinds[k].num_matrices; m++)
            memory_free(r->kinds[k].pool[m], r->kinds[k].num_slots * r->kinds[k].stride[m]);
    memory_free(r->ring, r->ring_bytes);
}

static void check_books(round_state *r)
{
    expert_cache *cache = r->pager.experts;
    pthread_mutex_lock(&r->pager.lock);
    uint32_t cached = 0;
    for (uint32_t k = 0; k < cache->num_kinds; k++) {
        expert_kind *kind = &cache->kinds[k];
        uint32_t loose = 0;
        for (uint32_t i = 0; i < kind->num_slots; i++) {
            expert_slot *slot = &kind->slots[i];
            loose += slot->key == EXPERT_NONE || slot->passing;
            cached += slot->key != EXPERT_NONE;
            if (slot->key != EXPERT_NONE && cache->slot_of_key[slot->key] != i)
                fail("a slot holds what lies elsewhere:", slot->key);
        }
        if (loose != kind->num_loose)
            fail("loose slots, counted as", kind->num_loose);
    }
    for (uint32_t key = 0; key < cache->num_layers * cache->num_experts; key++)
        cached -= cache->slot_of_key[key] != EXPERT_NONE;
    if (cached != 0)
        fail("keys without slots", cached);
    pthread_mutex_unlock(&r->pager.lock);
}

/* ---- passes ------------------------------------------------------------------------------------------------- */

/* Popular experts first, so that some are hit. */
static void choose_for_token(const round_state *r, uint32_t layer, int32_t *ids)
{
    uint32_t experts = r->layers[layer].num_experts;
    for (uint32_t i = 0; i < r->num_used; i++) {
        bool again = true;
        while (again) {
            uint32_t rank = below(experts), other = below(experts);
            ids[i] = (int32_t)((rank < other ? rank : other) + layer) % (int32_t)experts;
            again = false;
            for (uint32_t j = 0; j < i; j++)
                again = again || ids[j] == ids[i];
        }
    }
}

static void predict(round_state *r, uint32_t layer)
{
    uint32_t guesses[2 * MAX_USED], count = 0;
    for (uint32_t i = 0; i < r->num_used; i++) /* mostly right; now and then one that the layer does not have */
        guesses[count++] = below(4) ? (uint32_t)r->next_ids[i] : below(r->num_experts + 1);
    while (below(3) == 0 && count < 2 * r->num_used)
        guesses[count++] = below(r->num_experts);
    experts_predict(&r->pager, layer, guesses, count);
}

static uint32_t count_distinct(const int32_t *ids, size_t num_ids)
{
    uint32_t seen = 0;
    for (size_t i = 0; i < num_ids; i++)
        seen |= UINT32_C(1) << ids[i];
    return (uint32_t)__builtin_popcount(seen);
}

static void compare(const round_state *r, uint32_t number, uint32_t matrix, totals *sum)
{
    const expert_layer *layer = &r->layers[number];
    const expert_kind *kind = &r->kinds[layer->kind];
    for (size_t i = 0; i < r->num_ids; i++) {
        const uint8_t *expected = truth + layer->offset[matrix] + (size_t)r->ids[i] * kind->bytes[matrix];
        if ((uint32_t)r->slots[i] >= kind->num_slots)
            fail("no such slot", (unsigned long long)r->slots[i]);
        if (memcmp(kind->pool[matrix] + (size_t)r->slots[i] * kind->stride[matrix], expected, kind->bytes[matrix]) != 0)
            fail("wrong bytes of expert", (unsigned long long)r->ids[i]);
        sum->compared++;
    }
}

/* One layer: chosen, the next one predicted, waited for and used matrix by matrix. false: the pass ends. */
static bool run_layer(round_state *r, uint32_t number, bool decoding, bool predicting, totals *sum)
{
    const expert_kind *kind = &r->kinds[r->layers[number].kind];
    int error;
    if (below(300) == 0) {
        int32_t wrong[2] = {0, below(2) ? -1 : (int32_t)r->layers[number].num_experts};
        if (experts_select(&r->pager, number, wrong, 2, decoding, r->slots, &error) || error != EINVAL)
            fail("an expert that is not there was chosen of layer", number);
    }
    if (!experts_select(&r->pager, number, r->ids, r->num_ids, decoding, r->slots, &error)) {
        uint32_t distinct = count_distinct(r->ids, r->num_ids);
        if ((error == E2BIG) != (distinct > kind->num_slots))
            fail("so many experts were refused:", distinct);
        if (error != E2BIG && !pager_halted(&r->pager))
            fail("a choice ended with error", (unsigned long long)error);
        sum->too_many += error == E2BIG;
        if (error == E2BIG)
            pager_abort(&r->pager);
        return false;
    }
    sum->selections++;
    if (predicting)
        predict(r, number + 1);
    if (below(50) == 0)
        return true; /* never used */
    for (uint32_t m = 0; m < kind->num_matrices; m++) {
        bool rest_ready;
        if (!experts_wait(&r->pager, m, &rest_ready))
            return false;
        compare(r, number, m, sum);
        if (rest_ready && m + 1 < kind->num_matrices)
            compare(r, number, m + 1, sum);
    }
    for (uint32_t m = 0; m < kind->num_matrices; m++) /* nothing was given away meanwhile */
        compare(r, number, m, sum);
    return true;
}

static bool use_streamed(round_state *r, uint32_t layer)
{
    const block *b = &r->streamed[layer];
    uint8_t *address;
    bool next_ready;
    if (r->pager.num_uses == 0)
        return true;
    if (!pager_acquire(&r->pager, layer, &address, &next_ready))
        return false;
    if (memcmp(address, truth + b->offset, b->bytes) != 0)
        fail("wrong bytes in streamed weight", layer);
    pager_release(&r->pager);
    return true;
}

static void run_pass(round_state *r, aborter *a, totals *sum)
{
    bool decoding = below(4) != 0, have_next = false;
    uint32_t tokens = decoding ? 1 : 2 + below(MAX_TOKENS - 1);
    atomic_store(&a->may_abort, below(3) == 0);
    if (!pager_begin_pass(&r->pager))
        fail(r->pager.error_text, 0);
    bool good = true;
    for (uint32_t l = 0; l < r->num_layers && good; l++) {
        for (uint32_t t = 0; t < tokens; t++)
            choose_for_token(r, l, r->ids + t * r->num_used);
        r->num_ids = tokens * r->num_used;
        if (have_next)
            memcpy(r->ids, r->next_ids, r->num_used * sizeof *r->ids);
        have_next = decoding && l + 1 < r->num_layers && below(5) != 0;
        if (have_next)
            choose_for_token(r, l + 1, r->next_ids);
        good = use_streamed(r, l) && run_layer(r, l, decoding, have_next, sum);
        if (below(80) == 0)
            break;
    }
    sum->aborted += !good;
    atomic_store(&a->may_abort, false);
    if (!pager_end_pass(&r->pager))
        fail(r->pager.error_text, (unsigned long long)r->pager.error);
    check_books(r);
}

int main(int argc, char **argv)
{
    page = memory_page_bytes();
    double end = begin(argc, argv, FILE_PAGES);
    totals sum = {0};
    while (now() < end) {
        static round_state r;
        open_round(&r);
        aborter a;
        start_aborter(&a, &r.pager);
        for (int i = 0; i < 60 && now() < end; i++)
            run_pass(&r, &a, &sum);
        stop_aborter(&a);
        pager_statistics s;
        pager_copy_statistics(&r.pager, &s);
        sum.passes += s.passes;
        sum.rounds++;
        close_round(&r, &sum);
    }
    free(truth);
    printf("rounds %llu passes %llu selections %llu too_many %llu aborted %llu compared %llu hits %llu guesses %llu "
           "guesses_used %llu\n",
           (unsigned long long)sum.rounds, (unsigned long long)sum.passes, (unsigned long long)sum.selections,
           (unsigned long long)sum.too_many, (unsigned long long)sum.aborted, (unsigned long long)sum.compared,
           (unsigned long long)sum.hits, (unsigned long long)sum.guesses, (unsigned long long)sum.guesses_used);
    return 0;
}

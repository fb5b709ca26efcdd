/* The cache of experts of a mixture-of-experts model.

   llama.cpp keeps the experts of a layer in one tensor for each matrix (gate, up, down) and multiplies by those that a
   router chose. Here each tensor is a pool of slots that all layers of the same kind share; an expert's matrices have the
   same slot number in their pools, come and go together, and a product is given slot numbers instead of expert numbers.

   One thread selects, waits and predicts; the pager's reading threads fetch pieces. All under the pager's lock, which
   the functions take unless their comment says otherwise. Which expert gives way is the policy's decision. */
#ifndef EDGEINFER_EXPERTS_H
#define EDGEINFER_EXPERTS_H

#include "pager.h"
#include "policy.h"

#define EXPERT_MATRICES 3
#define EXPERT_NONE UINT32_MAX
/* Pieces of guesses that are read at once: more would stand before what is needed next, which cannot overtake them. */
#define EXPERT_GUESSES_IN_FLIGHT 5

/* Layers whose experts are alike, and their pool. */
typedef struct {
    uint32_t num_matrices;
    size_t bytes[EXPERT_MATRICES];   /* of one expert */
    size_t stride[EXPERT_MATRICES];  /* from slot to slot */
    uint8_t *pool[EXPERT_MATRICES];  /* belongs to the caller and outlives the cache */
    uint32_t num_slots;
    policy *policy;                  /* taken over */
    struct expert_slot *slots;       /* made by experts_new */
    uint32_t num_loose;              /* slots that are free or passing: found before the policy is asked */
    uint32_t hand;                   /* where the search for one goes on */
} expert_kind;

/* Products that share one choice of experts. A layer of the model that routes twice is two of them. */
typedef struct {
    uint32_t kind, num_experts;
    uint32_t source[EXPERT_MATRICES];
    uint64_t offset[EXPERT_MATRICES]; /* in the file, of expert 0; the others follow */
} expert_layer;

typedef struct expert_slot {
    uint32_t key; /* layer * num_experts + expert; EXPERT_NONE: free */
    uint64_t selection; /* the last one that uses it */
    transfer matrix[EXPERT_MATRICES];
    unsigned in_flight;
    bool guessed;   /* brought in by a prediction, not wanted yet */
    bool passing;   /* brought in by a prefill: loose, unknown to the policy */
} expert_slot;

typedef struct {
    uint64_t wanted;      /* experts of decoded tokens */
    uint64_t hits;        /* of them, in the cache */
    uint64_t guess_hits;  /* of them, being read because of a prediction */
    uint64_t guesses;     /* predicted experts that were not in the cache */
    uint64_t guesses_used;
    uint64_t predicted;   /* all predicted experts of layers that were then decoded, in the cache or not */
    uint64_t predicted_right;
    uint64_t predicted_wanted; /* experts that those layers wanted */
    uint64_t prefill_wanted, prefill_hits;
} expert_statistics;

typedef struct {
    uint32_t slot, matrix, key;
} expert_request;

typedef struct {
    expert_request *entries; /* a ring */
    size_t capacity, first, count;
} expert_queue;

typedef struct expert_cache {
    uint32_t num_layers, num_experts; /* num_experts: of the layer that has most */
    expert_layer *layers;
    expert_kind *kinds;
    uint32_t num_kinds;
    uint32_t *slot_of_key;

    expert_queue needed, guessed;
    unsigned guesses_in_flight;
    uint64_t selection;      /* number of the current one */
    uint32_t layer;          /* of the current selection */
    uint32_t *chosen;        /* its slots, by expert in ascending order */
    uint32_t num_chosen;
    uint32_t *slot_of_expert; /* scratch, num_experts */
    uint32_t guesses_judged, guesses_right; /* since the last judgement */
    uint32_t predictions_off; /* so many are left out because guessing did not pay */
    uint32_t predicted_layer; /* EXPERT_NONE: no prediction is open */
    bool *predicted;          /* num_experts, of predicted_layer */
    uint32_t *guessed_slots;  /* of predicted_layer: num_guessed that were read because of it */
    uint32_t num_guessed;
    uint32_t awaited;         /* matrix of the selection that is waited for; EXPERT_NONE: none, or something else */
    expert_statistics statistics;
} expert_cache;

/* Takes over layers and kinds (malloc'ed) with their policies, also on failure; NULL and errno then. */
expert_cache *experts_new(expert_layer *layers, uint32_t num_layers, uint32_t num_experts, expert_kind *kinds,
                          uint32_t num_kinds);
void experts_free(expert_cache *cache);

/* The next piece, of `most` bytes at most, of what is needed, or of guesses. The lock is held. */
bool experts_next_chunk(expert_cache *cache, size_t most, pager_chunk *c, bool needed);

/* Makes the experts of one layer that `ids` names the current selection: missing ones are asked for, and slots[i]
   becomes the slot of expert ids[i]. `decoding`: they count for the policy; otherwise they only pass through.
   false and *error: ECANCELED (failed or aborted), EINVAL (an expert that the layer does not have), E2BIG (they need
   more slots than there are); the cache is as before with the last two. */
bool experts_select(pager *p, uint32_t layer, const int32_t *ids, size_t num_ids, bool decoding, int32_t *slots,
                    int *error);

/* Waits until this matrix of every selected expert is there. *rest_ready: so are the later ones. */
bool experts_wait(pager *p, uint32_t matrix, bool *rest_ready);

/* Whether what the computing thread waits for may have come, so that it should be woken. The lock is held. */
bool experts_awaited(const expert_cache *cache);

/* Reads these experts of a layer ahead, as far as slots can be had for them; those that it does not have are left out. */
void experts_predict(pager *p, uint32_t layer, const uint32_t *experts, size_t num_experts);

/* Forgets requests that nobody waits for any more, after a pass that was aborted. The lock is held. */
void experts_reset(expert_cache *cache);

#endif

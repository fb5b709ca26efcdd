/* Which cached expert gives way: replacement policies behind one table of functions.

   A key is an expert (of one layer); a slot holds one. Every policy allocates when it is created and never after,
   takes no locks (the caller serialises) and knows nothing of what a slot holds. The order of calls for a layer that
   wants some experts: policy_access for each of them, then for each that is absent policy_victim and policy_remove
   where no slot is free, and policy_insert.

   An expert that is read ahead is inserted without an access: "lru", "layers" and "arc" take that as a use, the others
   as none. So may_go must keep it until it was used or given up. */
#ifndef EDGEINFER_POLICY_H
#define EDGEINFER_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#define POLICY_NONE UINT32_MAX
#define POLICY_MAX_KEYS (UINT32_C(1) << 24)

typedef struct policy policy;

/* Zero or NULL stands for the default. Arrays are copied. */
typedef struct {
    double half_life;      /* lfu: a count loses half its weight in this many accesses for each key; 0: 6 */
    const float *cost;     /* gdsf: seconds (any unit) to read the key again; NULL: all alike */
    const uint32_t *layer; /* layers needs it: the key's layer */
    uint32_t num_layers;
    double shallow_share; /* layers: share of the slots that the first quarter of the layers keeps */
} policy_options;

/* The names, a NULL at the end; the first is the default. */
const char *const *policy_names(void);

/* NULL with errno: EINVAL for an unknown name, no slots, no or too many keys, or an option that is out of its range
   or that the policy needs ("layers": layer); ENOMEM. */
policy *policy_new(const char *name, uint32_t num_keys, uint32_t num_slots, const policy_options *options);
void policy_free(policy *p);

/* An expert is wanted, whether it is cached or not: one tick of the policy's clock. */
void policy_access(policy *p, uint32_t key, bool cached);

/* It is in the cache now; it left the cache. Without effect where that is so already. */
void policy_insert(policy *p, uint32_t key);
void policy_remove(policy *p, uint32_t key);

/* The cached key that should go first among those that may (may_go NULL: all may); POLICY_NONE if none may. */
uint32_t policy_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data);

#endif

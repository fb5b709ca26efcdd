/* What a policy is made of: the functions that policy.c calls. Only the policies include this. */
#ifndef EDGEINFER_POLICY_KIND_H
#define EDGEINFER_POLICY_KIND_H

#include <stddef.h>
#include <stdlib.h>

#include "policy.h"

typedef struct {
    const char *name;
    /* Options are checked and complete; NULL means out of memory. */
    policy *(*create)(uint32_t num_keys, uint32_t num_slots, const policy_options *options);
    void (*destroy)(policy *p);
    void (*access)(policy *p, uint32_t key, bool cached);
    void (*insert)(policy *p, uint32_t key);
    void (*remove)(policy *p, uint32_t key);
    uint32_t (*victim)(policy *p, bool (*may_go)(uint32_t key, void *data), void *data);
} policy_kind;

/* The first member of every policy; set by policy_new. */
struct policy {
    const policy_kind *kind;
};

extern const policy_kind policy_lrfu, policy_lru, policy_lfu, policy_arc, policy_layers, policy_gdsf;

#endif

#include "policy_lists.h"

#include <string.h>

bool lists_create(policy_lists *lists, uint32_t num_keys, uint32_t num_lists)
{
    size_t num_nodes = (size_t)num_keys + num_lists;
    *lists = (policy_lists){.num_keys = num_keys, .num_lists = num_lists};
    lists->next = malloc(num_nodes * sizeof *lists->next);
    lists->prev = malloc(num_nodes * sizeof *lists->prev);
    lists->list = malloc(num_keys);
    if (lists->next == NULL || lists->prev == NULL || lists->list == NULL) {
        lists_destroy(lists);
        return false;
    }
    memset(lists->list, LISTS_NONE, num_keys);
    for (uint32_t n = 0; n < num_lists; n++)
        lists->next[num_keys + n] = lists->prev[num_keys + n] = num_keys + n;
    return true;
}

void lists_destroy(policy_lists *lists)
{
    free(lists->next);
    free(lists->prev);
    free(lists->list);
}

void lists_move(policy_lists *lists, uint32_t key, uint32_t list)
{
    if (lists->list[key] != LISTS_NONE) {
        lists->length[lists->list[key]]--;
        lists->next[lists->prev[key]] = lists->next[key];
        lists->prev[lists->next[key]] = lists->prev[key];
    }
    lists->list[key] = (uint8_t)list;
    if (list == LISTS_NONE)
        return;
    uint32_t head = lists->num_keys + list, newest = lists->prev[head];
    lists->length[list]++;
    lists->prev[key] = newest;
    lists->next[key] = head;
    lists->next[newest] = lists->prev[head] = key;
}

uint32_t lists_oldest(const policy_lists *lists, uint32_t list, bool (*may_go)(uint32_t key, void *data), void *data)
{
    uint32_t head = lists->num_keys + list;
    for (uint32_t key = lists->next[head]; key != head; key = lists->next[key])
        if (may_go == NULL || may_go(key, data))
            return key;
    return POLICY_NONE;
}

#include "policy_heap.h"

#include <string.h>

bool heap_create(policy_heap *heap, uint32_t num_keys)
{
    *heap = (policy_heap){.num_keys = num_keys};
    heap->keys = malloc(num_keys * sizeof *heap->keys);
    heap->place = malloc(num_keys * sizeof *heap->place);
    heap->score = calloc(num_keys, sizeof *heap->score);
    if (heap->keys == NULL || heap->place == NULL || heap->score == NULL) {
        heap_destroy(heap);
        return false;
    }
    memset(heap->place, 0xff, num_keys * sizeof *heap->place);
    return true;
}

void heap_destroy(policy_heap *heap)
{
    free(heap->keys);
    free(heap->place);
    free(heap->score);
}

static bool goes_before(const policy_heap *heap, uint32_t a, uint32_t b)
{
    return heap->score[a] < heap->score[b] || (heap->score[a] == heap->score[b] && a < b);
}

static void put(policy_heap *heap, uint32_t place, uint32_t key)
{
    heap->keys[place] = key;
    heap->place[key] = place;
}

static void move_to_its_place(policy_heap *heap, uint32_t key)
{
    uint32_t place = heap->place[key];
    while (place > 0 && goes_before(heap, key, heap->keys[(place - 1) / 2])) {
        put(heap, place, heap->keys[(place - 1) / 2]);
        place = (place - 1) / 2;
    }
    for (;;) {
        uint32_t child = 2 * place + 1;
        if (child + 1 < heap->length && goes_before(heap, heap->keys[child + 1], heap->keys[child]))
            child++;
        if (child >= heap->length || !goes_before(heap, heap->keys[child], key))
            break;
        put(heap, place, heap->keys[child]);
        place = child;
    }
    put(heap, place, key);
}

void heap_set_score(policy_heap *heap, uint32_t key, double score)
{
    heap->score[key] = score;
    if (heap_holds(heap, key))
        move_to_its_place(heap, key);
}

void heap_insert(policy_heap *heap, uint32_t key)
{
    if (heap_holds(heap, key))
        return;
    put(heap, heap->length++, key);
    move_to_its_place(heap, key);
}

void heap_remove(policy_heap *heap, uint32_t key)
{
    uint32_t place = heap->place[key];
    if (place == POLICY_NONE)
        return;
    uint32_t last = heap->keys[--heap->length];
    heap->place[key] = POLICY_NONE;
    if (last == key)
        return;
    put(heap, place, last);
    move_to_its_place(heap, last);
}

/* Each key finds its place under those before it. */
static void build(policy_heap *heap)
{
    uint32_t length = heap->length;
    for (heap->length = 0; heap->length < length;)
        move_to_its_place(heap, heap->keys[heap->length++]);
}

void heap_divide_scores(policy_heap *heap, double divisor)
{
    for (uint32_t key = 0; key < heap->num_keys; key++)
        heap->score[key] /= divisor;
    build(heap); /* scores that have become equal go by the key */
}

void heap_copy_scores(policy_heap *heap, const policy_heap *from)
{
    memcpy(heap->score, from->score, heap->num_keys * sizeof *heap->score);
    build(heap);
}

/* `lowest` so far, or one under `place`. As deep as the heap is: 24 at most. */
static uint32_t search(const policy_heap *heap, uint32_t place, uint32_t lowest,
                       bool (*may_go)(uint32_t key, void *data), void *data)
{
    if (place >= heap->length)
        return lowest;
    uint32_t key = heap->keys[place];
    if (lowest != POLICY_NONE && goes_before(heap, lowest, key))
        return lowest;
    if (may_go == NULL || may_go(key, data))
        return key;
    lowest = search(heap, 2 * place + 1, lowest, may_go, data);
    return search(heap, 2 * place + 2, lowest, may_go, data);
}

uint32_t heap_lowest(const policy_heap *heap, bool (*may_go)(uint32_t key, void *data), void *data)
{
    return search(heap, 0, POLICY_NONE, may_go, data);
}

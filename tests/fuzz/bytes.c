/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The content of a page: each word names its page, its version and its place in the page, so that a wrong word shows
 * where it came from.
 */
#include "fuzz.h"

/* kind 2 bits, page 10, version 24, index 18, round 10 */
enum { WORD_SOURCE = 1, WORD_WRITTEN = 2 };

static uint64_t make_word(unsigned kind, unsigned page, uint32_t number, unsigned index)
{
    return (uint64_t)kind << 62 | (uint64_t)page << 52 | (uint64_t)(number & 0xffffff) << 28 | (uint64_t)index << 10 |
           (world->plan.seed & 0x3ff);
}

uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= UINT64_C(0x7fb5d329728ea185);
    x ^= x >> 27;
    x *= UINT64_C(0x81dadef4bc2dd44d);
    return x ^ x >> 33;
}

/* Decided by page and version, so that every fill of that version agrees. */
enum content content_of(unsigned page, uint32_t version)
{
    uint64_t number = mix(world->plan.seed ^ (uint64_t)page << 32 ^ version) % 32;
    struct slot *slot = slot_of(page);
    if (slot->source == KUF_SOURCE_ZERO && slot->fixed && version == 1)
        return CONTENT_ZERO;
    if (number < 5)
        return CONTENT_ZERO;
    return number < 7 && world->plan.failing_source && !slot->fixed ? CONTENT_BAD : CONTENT_DATA;
}

uint64_t word_at(unsigned page, uint32_t version, unsigned index)
{
    return make_word(WORD_SOURCE, page, version, index);
}

uint64_t written_word(unsigned page, uint32_t number)
{
    return make_word(WORD_WRITTEN, page, number, WRITE_WORD);
}

void put_page(void *buffer, unsigned page, uint32_t version, size_t length)
{
    uint64_t *words = buffer;
    if (content_of(page, version) == CONTENT_ZERO) {
        memset(buffer, 0, length);
        return;
    }
    uint64_t first = word_at(page, version, 0);
    for (size_t i = 0; i < length / 8; i++)
        words[i] = first + ((uint64_t)i << 10);
}

/* False when the word belongs to another page, place or round. A written word sets only value->written. */
bool decode(unsigned page, unsigned index, uint64_t word, struct value *value)
{
    *value = (struct value){.kind = KIND_ZERO};
    if (word == 0)
        return true;
    value->version = (uint32_t)(word >> 28 & 0xffffff);
    if (word == make_word(WORD_SOURCE, page, value->version, index)) {
        value->kind = KIND_SOURCE;
        return true;
    }
    value->written = value->version;
    value->version = 0;
    return index == WRITE_WORD && word == written_word(page, value->written);
}

void describe_word(char *text, size_t room, uint64_t word)
{
    if (word == 0)
        snprintf(text, room, "zero");
    else
        snprintf(text, room, "%#" PRIx64 ": %s page %u version %u word %u round %u", word,
                 word >> 62 == WORD_SOURCE ? "source" : word >> 62 == WORD_WRITTEN ? "written" : "unknown",
                 (unsigned)(word >> 52 & 0x3ff), (unsigned)(word >> 28 & 0xffffff), (unsigned)(word >> 10 & 0x3ffff),
                 (unsigned)(word & 0x3ff));
}

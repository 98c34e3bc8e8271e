/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The message with which Firecracker hands its memory over, as examples/c/firecracker_handler.c reads it, given any bytes at
 * all. For the fuzz target here, and for tests/c/firecracker_message.c, which runs it over the corpus.
 */
#ifndef KUF_FUZZ_FIRECRACKER_H
#define KUF_FUZZ_FIRECRACKER_H

#define main handler_main
#include "../examples/c/firecracker_handler.c"
#undef main

static void message_holds(bool what, const char *why)
{
    if (what)
        return;
    fprintf(stderr, "%s\n", why);
    abort();
}

/* A message is taken in pieces, and looked at again with each of them. */
static void read_message(const unsigned char *bytes, size_t length)
{
    static struct region regions[REGIONS_MAX], again[REGIONS_MAX];
    size_t count = 0, count_again = 0;
    /* Exactly as long as it is, so that a byte too many is found. */
    char *text = malloc(length > 0 ? length : 1);
    message_holds(text != NULL, "memory for the message");
    if (length > 0)
        memcpy(text, bytes, length);
    struct reader whole = { .start = text, .at = text, .end = text + length };
    bool good = take_regions(&whole, regions, &count);
    message_holds(count <= REGIONS_MAX, "no more regions than there is room for");
    message_holds(whole.at >= text && whole.at <= whole.end, "the reader stays inside");
    message_holds(good || whole.wrong != NULL || whole.at == whole.end, "it says why, or wants more");
    /* What is good, or may become so, has no wrong beginning. */
    for (size_t part = 0; (good || whole.wrong == NULL) && part < length && part < 64; part++) {
        struct reader begun = { .start = text, .at = text, .end = text + part };
        message_holds(take_regions(&begun, again, &count_again) || begun.wrong == NULL,
                      "the beginning of a good message is no wrong one");
    }
    free(text);
}

#endif

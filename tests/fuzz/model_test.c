/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Tests of the model, without the library: it allows right bytes, and rejects each kind of wrong byte.
 */
#include "fuzz.h"

struct world *world;
_Thread_local unsigned trace_index;
struct kuf *_Atomic fuzz_handle;

static unsigned complaints, checks, failures;

void fail(const char *format, ...)
{
    (void)format;
    abort();
}

static void complain(unsigned page, const char *text)
{
    (void)page;
    (void)text;
    complaints++;
}

static const struct value zero = {.kind = KIND_ZERO}, poisoned = {.kind = KIND_POISONED};

static struct value source(uint32_t version, uint32_t written)
{
    return (struct value){KIND_SOURCE, version, written};
}

/* A page whose first versions are all data. */
static unsigned data_page(void)
{
    for (unsigned page = 0;; page++) {
        bool data = true;
        for (uint32_t version = 1; version < 5; version++)
            data = data && content_of(page, version) == CONTENT_DATA;
        if (data)
            return page;
    }
}

static void fresh(unsigned page)
{
    model_reset();
    complaints = 0;
    model_end(page, model_begin(page, EFFECT_ADD, 0, 0), OUTCOME_DONE, NULL, 0);
}

static void reads(unsigned page, struct value value)
{
    model_end(page, model_begin(page, EFFECT_READ, 0, 0), OUTCOME_VALUE, &value, 1);
}

static void does(unsigned page, enum effect effect, uint32_t argument, uint32_t flags)
{
    model_end(page, model_begin(page, effect, argument, flags), OUTCOME_DONE, NULL, 0);
}

/* Whether the model has complained so far, as it should. */
static void expect(bool wrong, const char *what)
{
    bool good = (complaints > 0) == wrong;
    checks++;
    failures += !good;
    printf("%s - %s: %s\n", good ? "ok" : "not ok", what, wrong ? "refused" : "allowed");
}

static void one_after_the_other(unsigned page)
{
    fresh(page);
    reads(page, source(1, 0));
    expect(false, "the source's bytes");
    fresh(page);
    reads(page, zero);
    expect(true, "zero in place of data");
    fresh(page);
    reads(page, poisoned);
    expect(true, "poison where the source does not fail");
    fresh(page);
    does(page, EFFECT_WRITE, 1, 0);
    reads(page, source(1, 1));
    expect(false, "what the guest wrote");
    reads(page, source(1, 0));
    expect(true, "a write that is lost");
    fresh(page);
    reads(page, source(1, 0));
    does(page, EFFECT_DISCARD, 0, 0);
    reads(page, source(2, 0));
    expect(false, "the next version after a discard");
    fresh(page);
    reads(page, source(1, 0));
    does(page, EFFECT_DISCARD, 0, 0);
    reads(page, source(1, 0));
    expect(true, "stale bytes after a discard");
    fresh(page);
    does(page, EFFECT_GIVE_BACK, 0, 0);
    reads(page, zero);
    expect(false, "zero after memory was given back");
    reads(page, source(1, 0));
    expect(true, "old bytes after memory was given back");
    fresh(page);
    does(page, EFFECT_END, 0, KUF_END_POISON);
    reads(page, poisoned);
    expect(false, "poison after an end that poisons");
    fresh(page);
    does(page, EFFECT_END, 0, KUF_END_POPULATE);
    reads(page, poisoned);
    expect(true, "poison after an end that fills");
    fresh(page);
    model_end(page, model_begin(page, EFFECT_RESOLVE, 1, 0), OUTCOME_MADE, NULL, 0);
    model_end(page, model_begin(page, EFFECT_RESOLVE_ZERO, 0, 0), OUTCOME_MADE, NULL, 0);
    expect(true, "two calls that both made one page present");
}

static void at_once(unsigned page)
{
    struct value old = source(1, 0), new = source(2, 0), both[] = {source(1, 0), source(2, 0)};
    fresh(page);
    reads(page, old);
    int discard = model_begin(page, EFFECT_DISCARD, 0, 0), look = model_begin(page, EFFECT_READ, 0, 0);
    model_end(page, look, OUTCOME_VALUE, &old, 1);
    model_end(page, discard, OUTCOME_DONE, NULL, 0);
    expect(false, "old bytes while a discard is under way");
    reads(page, new);
    expect(false, "new bytes after it");

    fresh(page);
    reads(page, old);
    discard = model_begin(page, EFFECT_DISCARD, 0, 0);
    look = model_begin(page, EFFECT_READ, 0, 0);
    model_end(page, discard, OUTCOME_DONE, NULL, 0);
    model_end(page, look, OUTCOME_VALUE, &old, 1);
    expect(false, "old bytes by a look that began before it ended");
    reads(page, old);
    expect(true, "old bytes by a look that began afterwards");

    fresh(page);
    reads(page, old);
    discard = model_begin(page, EFFECT_DISCARD, 0, 0);
    reads(page, new);
    reads(page, old);
    expect(true, "old bytes after new ones");
    (void)discard;

    fresh(page);
    reads(page, old);
    look = model_begin(page, EFFECT_READ, 0, 0);
    model_end(page, look, OUTCOME_MIXED, both, 2);
    expect(true, "two contents in one look with nothing under way");

    fresh(page);
    int end = model_begin(page, EFFECT_END, 0, 0);
    model_end(page, end, OUTCOME_DONE, NULL, 0);
    reads(page, source(1, 0));
    expect(false, "an end that finds the page filled");
    reads(page, zero);
    expect(true, "zero after a slot has ended");
}

int main(void)
{
    world = calloc(1, sizeof(*world));
    world->plan.seed = 1;
    for (unsigned i = 0; i < SLOTS; i++)
        world->slot[i].page_size = SMALL_PAGE;
    model_complains = complain;
    one_after_the_other(data_page());
    at_once(data_page());
    printf("%u checks, %u failed\n", checks, failures);
    return failures != 0;
}

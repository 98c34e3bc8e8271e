/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_settings reports the settings of a handle and its slots: defaults filled in, options granted or not. */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;

static struct kuf_settings_info settings_of(struct kuf *kuf, uint64_t gpa)
{
    struct kuf_settings_info settings = {.size = sizeof(settings)};
    must(kuf_settings(kuf, gpa, &settings) == 0, "kuf_settings answers");
    is(settings.size, sizeof(settings), "size is as it was set");
    return settings;
}

static void nothing_is_said(void *opaque, uint32_t level, const char *text)
{
    (void)opaque, (void)level, (void)text;
}

/* Whatever the machine allows. */
static uint32_t mode_of(uint32_t open_flags)
{
    return open_flags & ~(uint32_t)KUF_OPEN_USER_MODE_ONLY;
}

static void defaults(void)
{
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .userfaultfds = 1});
    struct kuf_settings_info got = settings_of(kuf, KUF_ALL);
    is(got.mechanism, KUF_MECHANISM_USERFAULTFD, "the mechanism that was chosen");
    is(mode_of(got.open_flags), 0, "a fill callback is no flag");
    is(got.flags, 0, "no slot, no flags of one");
    is(got.fill_threads, 2, "threads by default");
    is(got.userfaultfds, 1, "one userfaultfd");
    is(got.spin_us, 0, "no spinning");
    is(got.log_level, 0, "no log");
    is(got.demand_run, 2 << 20, "demand_run by default");
    is(got.populate_run, 256 << 10, "populate_run by default");
    is(got.page_size, page_size(), "ordinary pages");
    close_with(kuf, 0);
}

static void as_asked_for(void)
{
    struct kuf *kuf = open_with((struct kuf_options){
        .flags = KUF_OPEN_SOURCES | KUF_OPEN_DETECT_ZERO, .log = nothing_is_said, .fill_threads = 3, .userfaultfds = 4,
        .spin_us = 50, .demand_run = 3 * page_size() + 1, .populate_run = 1});
    struct kuf_settings_info got = settings_of(kuf, KUF_ALL);
    is(mode_of(got.open_flags), KUF_OPEN_SOURCES | KUF_OPEN_DETECT_ZERO, "the flags of the handle");
    is(got.fill_threads, 3, "threads");
    is(got.userfaultfds, 4, "userfaultfds");
    ok(got.spin_us == 50 || got.spin_us == 0, "spinning, where it has an effect: %u us", got.spin_us);
    is(got.log_level, KUF_LOG_WARN, "a log has warnings by default");

    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf_source zeroes = {.size = sizeof(zeroes), .kind = KUF_SOURCE_ZERO};
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = PAGES * page_size(), .hva = (uintptr_t)ram,
                              .source = &zeroes};
    is(kuf_add_memory(kuf, &slot), 0, "adds");
    got = settings_of(kuf, BASE + PAGES * page_size() - 1);
    is(got.demand_run, 3 * page_size(), "demand_run of the slot is of whole pages");
    is(got.populate_run, page_size(), "populate_run is a page at least");
    is(got.page_size, page_size(), "its pages");
    is(got.flags, 0, "filled by copy");
    struct kuf_settings_info none = {.size = sizeof(none)};
    is(kuf_settings(kuf, BASE + PAGES * page_size(), &none), -ENOENT, "behind the slot");
    close_with(kuf, KUF_END_POISON);
}

static void caller_driven(uint32_t mode)
{
    struct kuf *kuf = open_with((struct kuf_options){.flags = mode, .fill_threads = 7, .spin_us = mode ? 50 : 0,
                                                     .userfaultfds = 1});
    struct kuf_settings_info got = settings_of(kuf, KUF_ALL);
    is(mode_of(got.open_flags), mode ? mode : KUF_OPEN_CALLER_DRIVEN, "the mode");
    is(got.fill_threads, 0, "no fills, no threads for them");
    is(got.demand_run, 0, "and no demand_run");
    is(got.populate_run, 0, "and no populate_run");
    is(got.spin_us, 0, "and no spinning thread");
    close_with(kuf, 0);
}

static void in_place(void)
{
    int fd;
    unsigned char *ram = map_shared(PAGES * page_size(), &fd);
    struct kuf *kuf = open_serviced(&source);
    add_shared(kuf, BASE, ram, PAGES * page_size(), fd, 0);
    is(settings_of(kuf, BASE).flags, has_feature(KUF_FEATURE_MINOR) ? KUF_SETTING_IN_PLACE : 0, "a file's slot");
    close_with(kuf, KUF_END_POISON);
}

static void huge(void)
{
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_serviced(&source);
    add_with_flags(kuf, BASE, ram, PAGES * page_size(), KUF_MEMORY_HUGE);
    uint32_t flags = settings_of(kuf, BASE).flags;
    ok(flags == KUF_SETTING_HUGE || (flags == 0 && !has_feature(KUF_FEATURE_HUGE)), "huge pages, where they can be had: %#x", flags);
    close_with(kuf, KUF_END_POISON);
}

static void adopted(void)
{
    int uffd = own_userfaultfd(0);
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY});
    is(settings_of(kuf, KUF_ALL).userfaultfds, 0, "the library has opened none");
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = PAGES * page_size(), .hva = (uintptr_t)ram,
                              .uffd = uffd};
    is(kuf_add_memory(kuf, &slot), 0, "adds");
    is(settings_of(kuf, BASE).flags, KUF_SETTING_ADOPTED, "the slot's is the caller's");
    is(settings_of(kuf, BASE).userfaultfds, 1, "and one");
    close_with(kuf, KUF_END_POISON);
    close(uffd);

    uffd = own_userfaultfd(0);
    ram = map_anonymous(PAGES * page_size());
    kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY});
    slot.uffd = uffd;
    slot.flags = KUF_MEMORY_REMOTE;
    slot.hva = (uintptr_t)ram;
    is(kuf_add_memory(kuf, &slot), 0, "adds memory of what may be another process");
    is(settings_of(kuf, BASE).flags, KUF_SETTING_ADOPTED | KUF_SETTING_REMOTE, "as a remote slot");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
}

int main(void)
{
    begin();
    defaults();
    as_asked_for();
    caller_driven(0);
    caller_driven(KUF_OPEN_DIRECT);
    in_place();
    huge();
    adopted();
    return done();
}

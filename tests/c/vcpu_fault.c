/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_vcpu_fault: the page is present when it returns, filled on the calling thread or waited for. */
#include "harness.h"

#define BASE UINT64_C(0x60000000)
enum { PAGES = 32, VCPUS = 4 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;
static unsigned char *ram;

static void *run_vcpu(void *unused)
{
    (void)unused;
    for (int i = 0; i < PAGES; i++) {
        uint64_t gpa = BASE + i * page_size();
        if (kuf_vcpu_fault(kuf, gpa + 12, 8, 1 << 4) != 0 ||
            !holds_content(ram + i * page_size(), gpa, page_size(), 1))
            return "wrong";
    }
    return NULL;
}

int main(void)
{
    begin();
    size_t page = page_size();
    ram = map_anonymous(PAGES * page);
    kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, PAGES * page);

    pthread_t vcpus[VCPUS];
    for (int i = 0; i < VCPUS; i++)
        vcpus[i] = start(run_vcpu, NULL);
    for (int i = 0; i < VCPUS; i++) {
        void *wrong;
        pthread_join(vcpus[i], &wrong);
        ok(wrong == NULL, "vCPU %d gets every page", i);
    }
    struct kuf_stats_info stats = stats_of(kuf);
    is(stats.vcpu_faults, VCPUS * PAGES, "each exit is counted");
    is(stats.fills, PAGES, "each page is filled once");
    is(stats.bytes_copied, PAGES * page, "and copied once");

    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "pages are dropped");
    is(kuf_vcpu_fault(kuf, BASE + page - 1, 2, 0), 0, "an access across two pages");
    is(progress_of(kuf, BASE).present, 2 * page, "serves both");
    is(kuf_vcpu_fault(kuf, BASE - page, page, 0), -ENOENT, "an address of no slot is not the library's");

    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 10 * page);
    is(kuf_vcpu_fault(kuf, BASE + 10 * page, page, 0), -EHWPOISON, "a page that cannot be filled");
    wait_until(atomic_load(&source.events[poison_event()]) == 1);
    is(kuf_vcpu_fault(kuf, BASE + 11 * page, page, 0), 0, "its neighbour is served");
    close_with(kuf, KUF_END_POISON);
    return done();
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * probe.c - prints which mechanisms can serve guest page faults on this host, and why the others cannot
 *
 * Build:  cc -O2 -o probe probe.c $(pkg-config --cflags --libs kuf)
 * Run:    ./probe            for people
 *         ./probe --json     for programs
 *
 * It creates a VM if /dev/kvm can be opened, because the KVM mechanisms depend on the VM. It exits with 0 if a
 * mechanism works here, otherwise with 77.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <kuf-kvm.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "example.h"

static const char usage[] =
    "usage: probe [--json]\n"
    "Prints which mechanisms can serve guest page faults on this host, and why the others cannot.\n";

static const char *const mechanism_names[KUF_MECHANISM_COUNT] = {
    [KUF_MECHANISM_AUTO] = "none",
    [KUF_MECHANISM_USERFAULTFD] = "userfaultfd",
    [KUF_MECHANISM_KVM_BITMAP] = "kvm-bitmap",
    [KUF_MECHANISM_KVM_ASYNC] = "kvm-async",
};

static const struct {
    uint32_t feature;
    const char *name;
    const char *meaning;
} features[] = {
    { KUF_FEATURE_KERNEL_FAULTS, "kernel-faults", "userfaultfd serves KVM guests for this process" },
    { KUF_FEATURE_POISON, "poison", "touching a page that could not be filled raises SIGBUS" },
    { KUF_FEATURE_MINOR, "minor", "shared memory is filled in place, without a copy" },
    { KUF_FEATURE_HUGE, "huge", "anonymous memory can be filled with huge pages" },
    { KUF_FEATURE_THREAD_ID, "thread-id", "waiting times are known for each thread" },
};

enum { FEATURES = sizeof(features) / sizeof(features[0]) };

/* Returns the descriptor of a new VM, or -1 with the reason in *why. */
static int open_vm(const char **why)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    *why = vm < 0 ? strerror(errno) : "opened";
    if (kvm >= 0)
        close(kvm);
    return vm;
}

/* kuf_probe answers for KVM guests. An emulator needs less; kuf_open tells whether that works. */
static bool serves_user_mode(void)
{
    struct kuf_options options = { .size = sizeof(options), .flags = KUF_OPEN_USER_MODE_ONLY | KUF_OPEN_CALLER_DRIVEN };
    struct kuf *kuf;
    return kuf_open(&options, &kuf) == 0 && kuf_close(&kuf, 0) == 0;
}

static bool works(const struct kuf_probe_info *probe, unsigned mechanism)
{
    return probe->mechanisms & 1u << mechanism;
}

static void print_text(const struct kuf_probe_info *probe, const char *kvm, bool user_mode)
{
    uint32_t version = kuf_version();
    printf("libkuf        %u.%u.%u\n", version >> 16, version >> 8 & 255, version & 255);
    printf("/dev/kvm      %s\n", kvm);
    printf("page size     %u\n", probe->page_size);
    printf("recommended   %s\n\n", mechanism_names[probe->recommended]);
    for (unsigned i = KUF_MECHANISM_AUTO + 1; i < KUF_MECHANISM_COUNT; i++) {
        printf("%-13s %s", mechanism_names[i], works(probe, i) ? "yes" : "no");
        if (!works(probe, i))
            printf(" (%s)", strerror(-probe->error[i]));
        printf("\n              %s\n", probe->why[i]);
    }
    printf("\n%-13s %-4s memory touched only from user mode can be served (KUF_OPEN_USER_MODE_ONLY)\n", "user-mode",
           user_mode ? "yes" : "no");
    for (unsigned i = 0; i < FEATURES; i++)
        printf("%-13s %-4s %s\n", features[i].name, probe->features & features[i].feature ? "yes" : "no",
               features[i].meaning);
    printf("uffd features 0x%llx\n", (unsigned long long)probe->uffd_features);
}

static void print_json_string(const char *text)
{
    putchar('"');
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < ' ')
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static void print_json(const struct kuf_probe_info *probe, const char *kvm, bool user_mode)
{
    uint32_t version = kuf_version();
    printf("{\"version\":\"%u.%u.%u\",\"kvm\":", version >> 16, version >> 8 & 255, version & 255);
    print_json_string(kvm);
    printf(",\"page_size\":%u,\"recommended\":\"%s\",\"mechanisms\":[", probe->page_size,
           mechanism_names[probe->recommended]);
    for (unsigned i = KUF_MECHANISM_AUTO + 1; i < KUF_MECHANISM_COUNT; i++) {
        printf("%s{\"name\":\"%s\",\"works\":%s,\"error\":%d,\"why\":", i == KUF_MECHANISM_AUTO + 1 ? "" : ",",
               mechanism_names[i], works(probe, i) ? "true" : "false", probe->error[i]);
        print_json_string(probe->why[i]);
        putchar('}');
    }
    printf("],\"features\":{");
    for (unsigned i = 0; i < FEATURES; i++)
        printf("%s\"%s\":%s", i == 0 ? "" : ",", features[i].name,
               probe->features & features[i].feature ? "true" : "false");
    printf("},\"user_mode\":%s,\"uffd_features\":%llu}\n", user_mode ? "true" : "false",
           (unsigned long long)probe->uffd_features);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "json", no_argument, NULL, 'j' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    bool json = false;
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        switch (c) {
        case 'j': json = true; break;
        case 'h': fputs(usage, stdout); return EXIT_SUCCESS;
        default: fputs(usage, stderr); return EXIT_FAILURE;
        }
    }
    example_begin(10);

    const char *kvm;
    int vm = open_vm(&kvm);
    struct kuf_probe_info probe = { .size = sizeof(probe) };
    if (kuf_probe(vm, &probe) < 0)
        fail("kuf_probe: %s", kuf_error());
    bool user_mode = serves_user_mode();
    if (json)
        print_json(&probe, kvm, user_mode);
    else
        print_text(&probe, kvm, user_mode);
    if (vm >= 0)
        close(vm);
    if (probe.mechanisms == 0 && !user_mode)
        skip("no mechanism can serve page faults on this host");
    return EXIT_SUCCESS;
}

/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Linked into the C tests with ThreadSanitizer. At the first report, even a suppressed one, its runtime starts a
 * symbolizer and opens descriptors for it. This makes it do so before a test counts its descriptors.
 */
#include <stddef.h>

void __sanitizer_symbolize_pc(void *pc, const char *format, char *text, size_t size);
static void start_symbolizer(void) __attribute__((constructor));

static void start_symbolizer(void)
{
    char text[256];
    __sanitizer_symbolize_pc(__builtin_return_address(0), "%f", text, sizeof(text));
}

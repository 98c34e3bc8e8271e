/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Other mappings of the process do not disturb the library: a file whose name is in no encoding. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 8 };

static struct source source = SOURCE_INIT;

int main(void)
{
    begin();
    size_t length = PAGES * page_size();
    char directory[] = "/tmp/kuf-test-XXXXXX", path[64];
    must(mkdtemp(directory) != NULL, "a directory");
    snprintf(path, sizeof(path), "%s/\xff\xfe image", directory);
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    must(file >= 0 && ftruncate(file, (off_t)length) == 0, "a file whose name is no UTF-8");
    void *mapped = mmap(NULL, length, PROT_READ, MAP_SHARED, file, 0);
    must(mapped != MAP_FAILED, "maps it");
    unlink(path);
    rmdir(directory);

    int guest;
    unsigned char *ram = map_anonymous(length), *shared = map_shared(length, &guest);
    struct kuf *kuf = open_serviced(&source);
    add(kuf, BASE, ram, length);
    ok(holds_content(ram, BASE, length, 1), "memory is served beside it");
    /* Its page size is looked up in another file of /proc. */
    add(kuf, BASE * 2, shared, length);
    ok(holds_content(shared, BASE * 2, length, 1), "shared memory that comes without its file too");
    close_with(kuf, 0);
    close(guest);
    close(file);
    return done();
}

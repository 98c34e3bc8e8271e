/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The message of the Firecracker handler, over the corpus of its fuzz target: good messages, and all that have shown a
 * defect.
 */
#define _GNU_SOURCE
#include "../../fuzz/firecracker.h"

#include "harness.h"

static const char corpus[] = "fuzz/corpus/firecracker";

int main(void)
{
    begin();
    DIR *folder = opendir(corpus);
    if (folder == NULL)
        skip("no %s here: run it where the sources are", corpus);
    int files = 0;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        static unsigned char bytes[1 << 20];
        int file = openat(dirfd(folder), entry->d_name, O_RDONLY | O_CLOEXEC);
        ssize_t length = file < 0 ? -1 : read(file, bytes, sizeof(bytes));
        if (length >= 0) {
            read_message(bytes, (size_t)length);
            files++;
        }
        if (file >= 0)
            close(file);
    }
    closedir(folder);
    ok(files >= 10, "%d messages were read", files);
    return done();
}

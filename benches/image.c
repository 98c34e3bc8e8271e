/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * image.c - writes the file that guest memory is filled from
 *
 *     image make path=FILE size=BYTES [zero=PERCENT cluster=PAGES sparse=1]
 *
 * With sparse=1, zero pages are holes in the file. The program syncs the file, so that no write-back happens during a
 * measurement.
 */
#include "bench.h"

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv), *path = text_argument("path", NULL);
    uint64_t size = argument("size", 0), zero = argument("zero", 0), cluster = argument("cluster", 1);
    bool sparse = argument("sparse", 0) != 0;
    no_more_arguments();
    if (strcmp(side, "make") != 0 || path == NULL || size == 0 || size % RUN != 0 || cluster == 0)
        fail("usage: make path=FILE size=BYTES (a multiple of 2 MiB)");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    must(fd >= 0, path);
    must(ftruncate(fd, (off_t)size) == 0, path);
    uint64_t *block = malloc(RUN);
    must(block != NULL, "memory");
    for (uint64_t at = 0; at < size; at += RUN) {
        for (uint64_t word = 0; word < RUN / 8; word++)
            block[word] = image_page_is_zero((at / 8 + word) / WORDS, zero, cluster) ? 0 : image_word(at / 8 + word);
        for (uint64_t done = 0; done < RUN;) {
            /* Take the longest piece of only data or only zeroes, so that the page cache is like a dense file's. */
            uint64_t page = (at + done) / PAGE, part = RUN - done;
            bool hole = sparse && image_page_is_zero(page, zero, cluster);
            for (uint64_t n = 1; sparse && n < part / PAGE; n++)
                if (image_page_is_zero(page + n, zero, cluster) != hole)
                    part = n * PAGE;
            if (hole) {
                done += part;
                continue;
            }
            ssize_t wrote = pwrite(fd, (uint8_t *)block + done, part, (off_t)(at + done));
            must(wrote > 0, path);
            done += (uint64_t)wrote;
        }
    }
    must(fsync(fd) == 0, path);
    put_text("image", path);
    put_count("bytes", size);
    end_result();
}

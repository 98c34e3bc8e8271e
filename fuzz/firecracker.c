/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "firecracker.h"

void fuzz_firecracker(const unsigned char *bytes, size_t length);

void fuzz_firecracker(const unsigned char *bytes, size_t length)
{
    read_message(bytes, length);
}

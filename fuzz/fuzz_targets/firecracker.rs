#![no_main]

use kuf as _;

extern "C" {
    fn fuzz_firecracker(bytes: *const u8, length: usize);
}

// SAFETY: as many readable bytes as it says.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| unsafe { fuzz_firecracker(bytes.as_ptr(), bytes.len()) });

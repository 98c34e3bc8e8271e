//! Helpers that unit tests share.

/// A generator of the same numbers each time; each is below the bound passed.
pub fn random() -> impl FnMut(u64) -> u64 {
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    move |n| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % n
    }
}

//! Texts for the caller, as C strings.

/// Room for the text of an event or a log record, the terminator included.
pub const TEXT: usize = 1024;

/// Makes a C string of `text`, cut where it is too long. It allocates no memory, for the text may report that there is
/// none.
pub fn c_text(text: &str, blank: impl Fn(u8) -> bool) -> [u8; TEXT] {
    let mut room = [0; TEXT];
    let mut end = text.len().min(TEXT - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in room.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = if *from == 0 || blank(*from) { b' ' } else { *from };
    }
    room
}

//! Memory that mremap(2) has moved when no event can be read any more: the kernel is asked where it is.

use std::ops::Range;
use std::os::fd::AsFd;

use rustix::mm::MprotectFlags;

use super::{ioctl, Userfaultfd};
use crate::os::maps;

/// How often it is looked for: it may move again meanwhile.
const LOOKS: usize = 16;

impl Userfaultfd {
    /// Makes inaccessible what is registered outside of the addresses `settled`, which are in order. False: that failed.
    pub(super) fn hide_outside(&self, settled: &[Range<u64>]) -> bool {
        (0..LOOKS).any(|_| self.is_hidden_outside(settled))
    }

    /// Looks once, and makes inaccessible what it finds. True: it has found nothing.
    fn is_hidden_outside(&self, settled: &[Range<u64>]) -> bool {
        let Ok(registered) = maps::registered() else { return false };
        let mut hidden = true;
        for mapping in registered.iter().filter(|mapping| mapping.accessible) {
            for part in outside(&mapping.hva, settled).filter(|part| self.has(part, mapping.modes)) {
                hidden = false;
                // SAFETY: guest memory of a slot that ends. Its pages may not be read as zeroes.
                let _ = unsafe {
                    let len = (part.end - part.start) as usize;
                    rustix::mm::mprotect(part.start as *mut _, len, MprotectFlags::empty())
                };
            }
        }
        hidden
    }

    /// Whether these addresses are registered here, and not with another userfaultfd: then they can be registered again.
    fn has(&self, hva: &Range<u64>, modes: u64) -> bool {
        self.fds.iter().any(|fd| ioctl::register(fd.as_fd(), hva.start, hva.end - hva.start, modes).is_ok())
    }
}

/// The parts of `range` that are in none of `others`, which are in order.
fn outside<'a>(range: &Range<u64>, others: &'a [Range<u64>]) -> impl Iterator<Item = Range<u64>> + use<'a> {
    let (mut from, end) = (range.start, range.end);
    let mut others = others.iter();
    std::iter::from_fn(move || {
        while from < end {
            let Some(other) = others.next() else { return Some(std::mem::replace(&mut from, end)..end) };
            let part = from..other.start.min(end);
            from = from.max(other.end);
            if !part.is_empty() {
                return Some(part);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::outside;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn what_is_outside_of_ranges_is_found_in_order() {
        let parts = |range, others: &[_]| outside(&range, others).collect::<Vec<_>>();
        assert_eq!(parts(10..50, &[0..5, 20..30, 30..35, 60..70]), [10..20, 35..50]);
        assert_eq!(parts(0..80, &[0..12, 40..80]), [12..40]);
        assert_eq!(parts(10..50, &[]), [10..50]);
        assert!(parts(10..50, &[5..50]).is_empty() && parts(10..50, &[10..30, 30..60]).is_empty());
    }
}

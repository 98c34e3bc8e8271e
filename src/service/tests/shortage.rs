//! Installs that the kernel refuses for want of memory.

use rustix::io::Errno;

use crate::abi::*;
use crate::service::fault::retry;
use crate::service::fault::retry::RetryLimits;
use crate::service::tests::calls::Calls;
use crate::service::tests::faulty::rig;
use crate::service::tests::rig::{page_of, pattern, PAGE, PAGES};
use crate::sync::time::{Duration, Instant};

#[test]
fn a_shortage_that_passes_is_waited_out() {
    let Some(rig) = rig() else { return };
    rig.refuse_for_memory(5);
    assert_eq!(rig.touch(3).join().unwrap(), pattern(3));
    assert_eq!(rig.service.stats().install_no_memory, 5);
    rig.end(KUF_END_POISON);
}

#[test]
fn a_shortage_is_waited_out_once_by_the_end_and_not_once_a_page() {
    let Some(rig) = rig() else { return };
    rig.refuse_for_memory(u64::MAX);
    let since = Instant::now();
    rig.end(KUF_END_POPULATE | KUF_END_POISON);
    // Two seconds to fill, and two to poison. Backoff for each of the 64 pages would take far longer.
    assert!(since.elapsed() < Duration::from_secs(16), "{:?}", since.elapsed());
    rig.assert_closed(0..PAGES);
}

#[test]
fn a_shortage_while_the_source_is_read_is_waited_out_too() {
    let Some(rig) = rig() else { return };
    let attempts = std::cell::Cell::new(0);
    let after = |n, errno| {
        attempts.set(0);
        retry::patiently(&rig.service, &RetryLimits::default(), || {
            attempts.set(attempts.get() + 1);
            (attempts.get() > n).then_some(()).ok_or(errno)
        })
    };
    assert_eq!((after(3, Errno::NOMEM), attempts.get()), (Ok(()), 4));
    assert_eq!((after(3, Errno::FAULT), attempts.get()), (Err(Errno::FAULT), 1));
    rig.end(KUF_END_POISON);
}

#[test]
fn a_shortage_that_stays_is_an_error_and_no_zero_page() {
    let Some(rig) = rig() else { return };
    rig.refuse_for_memory(u64::MAX);
    assert_eq!(rig.service.resolve(0, &page_of(9)).unwrap_err().errno(), Errno::NOMEM);
    rig.refuse_for_memory(0);
    assert_eq!(rig.service.resolve(0, &page_of(9)).unwrap(), PAGE);
    assert_eq!(rig.touch(0).join().unwrap(), 9);
    rig.end(KUF_END_POISON);
}

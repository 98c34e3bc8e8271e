//! Faults that the caller reads itself (`kuf_read`).

use crate::error::{Error, Result};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Owner, Terms};
use crate::pages::State;
use crate::service::background::recorder;
use crate::service::fault::shortage;
use crate::service::{eventfd, Fault, Service};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::channel::{unbounded, Receiver, Sender};
use crate::sync::Arc;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Faults for `kuf_read`, and the descriptor that signals them. `kuf_read` checks the page state of each entry again, so an
/// entry whose page was resolved meanwhile does no harm.
pub struct Ready {
    sender: Sender<(Arc<Slot>, u64)>,
    receiver: Receiver<(Arc<Slot>, u64)>,
    signal: OwnedFd,
    ended: AtomicBool,
}

impl Ready {
    pub fn new() -> Result<Self> {
        let (sender, receiver) = unbounded();
        Ok(Self { sender, receiver, signal: eventfd()?, ended: AtomicBool::new(false) })
    }

    /// Readable when there may be something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }

    /// Lists a page that the caller owes.
    pub fn put(&self, slot: &Arc<Slot>, page: u64) {
        let _ = self.sender.send((slot.clone(), page));
    }

    /// The page that has been listed for longest.
    pub fn next(&self) -> Option<(Arc<Slot>, u64)> {
        self.receiver.try_recv().ok()
    }

    /// How many are listed.
    pub fn len(&self) -> usize {
        self.receiver.len()
    }

    /// Makes the descriptor readable. Err is an errno: a filter refuses it.
    fn signal(&self) -> std::result::Result<(), Errno> {
        const TRIES: usize = 3;
        let mut tries = (0..TRIES).map(|_| rustix::io::write(&self.signal, &1_u64.to_ne_bytes()));
        match tries.find(|result| matches!(result, Ok(_) | Err(Errno::AGAIN))) {
            // It is readable already.
            Some(_) => Ok(()),
            None => Err(Errno::PERM),
        }
    }

    /// Wakes the threads that poll, for good.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        let _ = self.signal();
    }

    /// To be called before looking into the queue: each later entry signals again.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.signal, &mut [0_u8; 8]);
        if self.ended.load(Ordering::Acquire) {
            let _ = self.signal();
        }
    }
}

/// Asks the caller for a page through `kuf_read`.
pub fn ask(service: &Service, slot: &Arc<Slot>, page: u64, waiter: Waiter) {
    let in_place = slot.in_place();
    {
        let Ok(mut claims) = slot.claims_for(&(page..page + 1), true) else {
            return shortage::serve_later(service, Fault::again(slot, waiter));
        };
        let terms = Terms { owner: Owner::Host, in_place, demand: true, speculative: false, since: None };
        let claimed = claims.claim(&slot.pages, page, 1, State::Absent, terms);
        recorder::record_joined(service, slot, page, &mut claims);
        let stray = claims.join(waiter).err();
        if claimed.is_none() {
            if claims.is_shut() {
                // Its page is poisoned next, or was, and that wakes the threads that wait for it.
                return;
            }
            drop(claims);
            // The page is neither absent nor filling now: it may have been given back meanwhile.
            return service.push_again(slot, stray);
        }
    }
    service.ready.put(slot, page);
    signal_caller(service);
}

/// Makes the caller's descriptor readable. A caller that cannot be told of faults would never fill them.
pub fn signal_caller(service: &Service) {
    if let Err(errno) = service.ready.signal() {
        service.fail(Error::system("writing to the eventfd of kuf_fd", errno).text());
    }
}

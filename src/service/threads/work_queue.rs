//! The work of service threads, in the order in which it came.
//!
//! The queue has one entry for each thread that waits for a page: a signal makes the thread fault again while its
//! earlier fault may still be queued. So the queue never has more demand than there are threads.

use std::collections::VecDeque;

use crate::abi::KUF_KVM_FAULT;
use crate::alloc::patiently;
use crate::service::{Fault, Work};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{lock, Arc, Mutex};

#[derive(Default)]
pub struct WorkQueue {
    list: Mutex<VecDeque<Work>>,
    /// The length, to be read without the lock.
    len: AtomicUsize,
}

impl WorkQueue {
    /// Appends `work`. Returns it if it is queued already, or if there is no memory for it.
    pub fn push(&self, work: Work) -> Option<Work> {
        let mut work = Some(work);
        let _ = patiently(|| {
            let mut list = lock(&self.list);
            if let Some(Work::Fault(fault)) = &work {
                if list.iter().any(|queued| matches!(queued, Work::Fault(earlier) if fault.is_again(earlier))) {
                    return Ok(());
                }
            }
            list.try_reserve(1)?;
            list.extend(work.take());
            self.len.store(list.len(), Ordering::SeqCst);
            Ok(())
        });
        work
    }

    /// Takes the oldest work.
    pub fn pop(&self) -> Option<Work> {
        if self.is_empty() {
            return None;
        }
        let mut list = lock(&self.list);
        let work = list.pop_front();
        self.len.store(list.len(), Ordering::SeqCst);
        work
    }

    pub fn len(&self) -> usize {
        self.len.load(Ordering::SeqCst)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Fault {
    /// Whether `earlier` is a fault of the same thread at the same page. Unknown threads count as one, for they wait
    /// for the same page. KVM queues one entry for each of its threads, and no signal makes it queue another.
    fn is_again(&self, earlier: &Self) -> bool {
        (self.flags | earlier.flags) & KUF_KVM_FAULT == 0
            && self.page == earlier.page
            && self.wait.thread == earlier.wait.thread
            && Arc::ptr_eq(&self.slot, &earlier.slot)
    }
}

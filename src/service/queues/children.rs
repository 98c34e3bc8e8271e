//! Forked children: their copy of the memory is served too, through views of the slots.

use crate::abi::KUF_EVENT_FORKED;
use crate::alloc::needed;
use crate::error::words;
use crate::mechanism::userfaultfd::Userfaultfd;
use crate::mechanism::Mechanism;
use crate::memory::{Map, Slot};
use crate::service::fault::notice::Notice;
use crate::service::queues::{watch, KernelQueue};
use crate::service::{Service, Work};
use crate::sync::Arc;
use std::os::fd::OwnedFd;

/// A child was forked: its copy of the memory gets its own views. Pages present now are the child's already.
pub fn follow_fork(service: &Service, parent: &Arc<KernelQueue>, fd: OwnedFd, work: &mut Vec<Work>) {
    forget_dead_children(service);
    let child: Arc<dyn Mechanism> = Arc::new(Userfaultfd::of_child(fd, parent.mechanism.facts().adopted));
    let map = service.memory.map();
    let its = || map.all().filter(|slot| slot.mechanism.id() == parent.mechanism.id());
    let add = |map: &mut Map| its().try_for_each(|slot| map.add_fork(Arc::new(Slot::forked(slot, child.clone())?)));
    // A child cannot be refused.
    let added = needed(|| service.memory.update(add));
    let (kind, error, text) = match added
        .and_then(|()| watch::add_queue(service, KernelQueue::new(child, 0, None, true, true)))
    {
        Ok(()) => (KUF_EVENT_FORKED, None, "the process forked; the child is served too".into()),
        Err(e) => (KUF_EVENT_FORKED, Some(e.errno()), words!("the process forked and the child cannot be served: {e}")),
    };
    work.push(Work::Notice(Notice { slot: None, kind, gpa: 0, len: 0, error, text }));
}

pub fn forget_dead_children(service: &Service) {
    for queue in service.queues.list().iter().filter(|queue| queue.fork && !queue.mechanism.is_alive()) {
        watch::drop_mechanism(service, queue.mechanism.id());
        let _ = service.memory.update(|map| {
            map.remove_forks(queue.mechanism.id());
            Ok(())
        });
    }
}

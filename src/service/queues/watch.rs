//! Adds kernel queues to the set that wakes the service threads, and removes them.

use crate::error::Result;
use crate::mechanism::Mechanism;
use crate::service::queues::KernelQueue;
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::Arc;

/// Reads a mechanism from now on.
pub fn add_mechanism(service: &Service, mechanism: Arc<dyn Mechanism>, host_fd: Option<(i32, bool)>) -> Result<()> {
    let (host_fd, remote) = host_fd.map_or((None, false), |(fd, remote)| (Some(fd), remote));
    if service.config.follow_fork || mechanism.facts().adopted {
        service.queues.spare.refill();
    }
    for queue in 0..mechanism.facts().queues {
        add_queue(service, KernelQueue::new(mechanism.clone(), queue, host_fd, remote, false))?;
    }
    Ok(())
}

pub fn add_queue(service: &Service, queue: Arc<KernelQueue>) -> Result<()> {
    let mechanism = queue.mechanism.clone();
    let remote = queue.remote;
    if remote || mechanism.facts().needs_polling {
        service.threads.look_now_and_then();
    }
    service.queues.change(|queues| queues.push(queue.clone()));
    if let Err(error) = watch_queue(service, &queue) {
        if !queue.fork {
            drop_mechanism(service, mechanism.id());
            return Err(error);
        }
        // A child cannot be refused.
        queue.unwatched.store(true, Ordering::Relaxed);
    }
    if remote && !service.config.direct {
        // A service thread has to start checking now and then that the process is alive.
        service.threads.waking.wake();
    }
    Ok(())
}

pub fn watch_queue(service: &Service, queue: &KernelQueue) -> Result<()> {
    let Some(fd) = queue.mechanism.fd(queue.number) else { return Ok(()) };
    service.threads.waking.watch(fd, queue.mechanism.id(), queue.number)
}

/// Stops reading a mechanism.
pub fn drop_mechanism(service: &Service, mechanism: u32) {
    service.queues.change(|queues| {
        queues.retain(|queue| {
            let other = queue.mechanism.id() != mechanism;
            queue.dropped.fetch_or(!other, Ordering::SeqCst);
            if let Some(fd) = queue.mechanism.fd(queue.number).filter(|_| !other) {
                service.threads.waking.unwatch(fd);
            }
            other
        });
    });
}

//! Events that a thread reports to the caller when it may call a callback.

use rustix::io::Errno;

use crate::caller::Event;
use crate::error::Words;
use crate::memory::Slot;
use crate::service::fault::pin::EventPin;
use crate::service::Service;
use crate::sync::Arc;

/// An event that was found while reading the kernel, or with locks held.
pub struct Notice {
    /// The slot it is of. None: of none.
    pub slot: Option<Arc<Slot>>,
    pub kind: u32,
    pub gpa: u64,
    pub len: u64,
    pub error: Option<Errno>,
    pub text: Words,
}

impl Notice {
    /// Raises it, unless its slot was removed since. With no lock held.
    pub fn raise(&self, service: &Service) {
        let Self { slot, kind, gpa, len, error, text } = self;
        let telling = match slot.as_deref() {
            None => None,
            Some(slot) => {
                let at_end = || (!service.life.is_open()).then(|| EventPin::at_end(slot)).flatten();
                let Some(telling) = EventPin::begin(slot).or_else(at_end) else { return };
                Some(telling)
            }
        };
        let opaque = slot.as_ref().map(|slot| slot.opaque);
        let event = Event { kind: *kind, gpa: *gpa, len: *len, error: *error, text, opaque };
        service.config.callbacks.event_of(telling.as_ref(), &event);
    }
}

//! The calls of the C interface as tests make them. Only this file knows where the library keeps a call.

use crate::error::Result;
use crate::service::background::populate;
use crate::service::calls::end_slot::Toll;
use crate::service::calls::{add_memory, close, discard, ensure, kvm, remove_memory, resolve};
use crate::service::config::{NewMemory, NewPopulate, Resolution};
use crate::service::Service;
use crate::sync::Arc;
use crate::uapi::kvm::KVM_MEMORY_EXIT_FLAG_USERFAULT;

pub trait Calls {
    fn add(&self, slot: NewMemory) -> Result<()>;
    fn remove(&self, gpa: u64, flags: u32) -> Result<()>;
    /// Returns the number of bytes that it made present.
    fn resolve(&self, gpa: u64, bytes: &[u8]) -> Result<u64>;
    fn ensure(&self, gpa: u64, len: u64) -> Result<()>;
    fn discard(&self, gpa: u64, len: u64, removed: bool) -> Result<()>;
    /// Everything, in the background.
    fn populate(&self);
    fn quiesce(&self, timeout_ms: i32) -> Result<()>;
    /// A vCPU's exit at `gpa`.
    fn vcpu_fault(&self, gpa: u64, len: u64) -> Result<()>;
}

impl Calls for Service {
    fn add(&self, slot: NewMemory) -> Result<()> {
        add_memory::add_memory(self, slot)
    }
    fn remove(&self, gpa: u64, flags: u32) -> Result<()> {
        remove_memory::remove_memory(self, gpa, flags)
    }
    fn resolve(&self, gpa: u64, bytes: &[u8]) -> Result<u64> {
        resolve::resolve(self, gpa, bytes.len() as u64, Resolution::Data(bytes.as_ptr()))
    }
    fn ensure(&self, gpa: u64, len: u64) -> Result<()> {
        ensure::ensure(self, gpa, len, -1)
    }
    fn discard(&self, gpa: u64, len: u64, removed: bool) -> Result<()> {
        discard::discard(self, gpa, len, removed)
    }
    fn populate(&self) {
        populate::populate(self, NewPopulate { stop: false, sweep: false, range: None, rate: 0 }).unwrap();
    }
    fn quiesce(&self, timeout_ms: i32) -> Result<()> {
        kvm::quiesce(self, timeout_ms)
    }
    fn vcpu_fault(&self, gpa: u64, len: u64) -> Result<()> {
        ensure::vcpu_fault(self, gpa, len, KVM_MEMORY_EXIT_FLAG_USERFAULT)
    }
}

/// The parts of `kuf_close`, in their order.
pub trait Close {
    /// Makes the fills. It may refuse, and the service continues.
    fn prepare_close(&self, flags: u32) -> Result<()>;
    /// The last part that may refuse.
    fn begin_end(&self, flags: u32) -> Result<()>;
    fn rest_of_end(&self, flags: u32);
}

impl Close for Arc<Service> {
    fn prepare_close(&self, flags: u32) -> Result<()> {
        close::prepare_close(self, flags)
    }
    fn begin_end(&self, flags: u32) -> Result<()> {
        close::begin_end(self, flags)
    }
    fn rest_of_end(&self, flags: u32) {
        let mut toll = Toll::default();
        close::settle_rest(self, flags, &mut toll);
        close::end(self, flags, &mut toll);
    }
}

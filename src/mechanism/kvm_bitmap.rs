//! KVM userfault bitmap: a memslot with KVM_MEM_USERFAULT has a bitmap, and a vCPU that touches a page whose bit is set
//! leaves KVM_RUN at once. It does not catch KVM's own accesses and the VMM's threads: these meet the userfaultfd
//! underneath, which also blocks every thread at a page whose bit is clear already and whose bytes are not installed
//! yet.

use std::ops::Range;
use std::os::fd::OwnedFd;

use super::bitmap::Bitmap;
use super::over::{OverBinding, OverMechanism};
use super::userfaultfd::{Registered, Userfaultfd};
use super::{Binding, Content, Facts, ForKvm, Installed, Mechanism};
use rustix::io::Errno;

use crate::error::Result;
use crate::mapping::Region;
use crate::pages::{Pages, State};
use crate::sync::Arc;

/// A VM's bitmaps, with a userfaultfd underneath.
pub struct KvmBitmap {
    facts: Facts,
    under: Arc<Userfaultfd>,
    vm: Arc<OwnedFd>,
}

impl KvmBitmap {
    /// `vm` is the library's own descriptor of the VM.
    pub fn new(under: Userfaultfd, vm: OwnedFd) -> Self {
        let facts = Facts { vcpu_exits: true, can_move: false, ..*under.facts() };
        Self { facts, under: Arc::new(under), vm: Arc::new(vm) }
    }
}

impl OverMechanism for KvmBitmap {
    type Under = Userfaultfd;

    fn under(&self) -> &Userfaultfd {
        &self.under
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, kvm: ForKvm) -> Result<Box<dyn Binding>> {
        let bitmap = Bitmap::new(region.clone(), kvm.memslot, self.vm.clone())?;
        Ok(Box::new(Exiting { under: Registered::new(self.under.clone(), region), bitmap }))
    }
}

/// A slot whose bitmap lets vCPUs exit.
struct Exiting {
    under: Registered,
    bitmap: Bitmap,
}

impl OverBinding for Exiting {
    type Under = Registered;

    fn under(&self) -> &Registered {
        &self.under
    }

    fn arm(&self, pages: &Pages) -> Result<()> {
        let mut from = 0;
        while let Some(run) = pages.first_run(from..pages.total(), State::Present, u64::MAX) {
            from = run.end;
            self.bitmap.bits.clear(&run);
        }
        self.under.arm(pages)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        if !content.is_poison() {
            // The userfaultfd still blocks touches until the pages are installed. A vCPU that touches one now waits there
            // for a moment.
            self.bitmap.bits.clear(pages);
        }
        self.under.install(pages, content)
    }

    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno> {
        // A bit has no effect on pages that KVM has mapped. Dropping a page removes it from KVM's mappings, so the bit
        // is set first. The pages include absent ones, whose bits were set already. If there is no memory to remember
        // which, these bits are clear after a failure: slower but right, because the userfaultfd still catches the
        // touches.
        let bits = &self.bitmap.bits;
        let before = bits.marked(pages);
        bits.set(pages);
        self.under.drop_pages(pages).inspect_err(|_| {
            bits.clear(pages);
            before.iter().for_each(|run| bits.set(run));
        })
    }

    fn bitmap(&self) -> Option<&Bitmap> {
        Some(&self.bitmap)
    }
}

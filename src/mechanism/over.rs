//! A mechanism over another one, and a binding over another one. This file forwards the methods that they do not override.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use super::bitmap::Bitmap;
use super::gate::Gate;
use super::{Binding, Content, Facts, ForKvm, Installed, Mechanism, Message, Reported, Stray};
use rustix::io::Errno;

use crate::error::Result;
use crate::mapping::Region;
use crate::pages::Pages;
use crate::sync::Arc;

/// A mechanism that has another one's queues.
pub trait OverMechanism: Send + Sync {
    type Under: Mechanism;

    fn under(&self) -> &Self::Under;

    fn facts(&self) -> &Facts {
        self.under().facts()
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno> {
        self.under().read(queue, room, out)
    }

    fn is_quiet(&self, queue: usize) -> bool {
        self.under().is_quiet(queue)
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, kvm: ForKvm) -> Result<Box<dyn Binding>>;
}

impl<M: OverMechanism> Mechanism for M {
    fn facts(&self) -> &Facts {
        OverMechanism::facts(self)
    }

    fn gate(&self) -> &Gate {
        self.under().gate()
    }

    fn fd(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.under().fd(queue)
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno> {
        OverMechanism::read(self, queue, room, out)
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, kvm: ForKvm) -> Result<Box<dyn Binding>> {
        OverMechanism::bind(self, region, kvm)
    }

    fn wake_range(&self, hva: Range<u64>) {
        self.under().wake_range(hva);
    }

    fn is_quiet(&self, queue: usize) -> bool {
        OverMechanism::is_quiet(self, queue)
    }

    fn disown(&self, stray: Stray) {
        self.under().disown(stray);
    }

    fn give_up(&self, settled: &[Range<u64>], instead: BorrowedFd<'_>) -> bool {
        self.under().give_up(settled, instead)
    }

    fn is_alive(&self) -> bool {
        self.under().is_alive()
    }
}

/// A binding that does something before another one, or in its place.
pub trait OverBinding: Send + Sync {
    type Under: Binding;

    fn under(&self) -> &Self::Under;

    fn arm(&self, pages: &Pages) -> Result<()> {
        self.under().arm(pages)
    }

    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno> {
        self.under().in_place_buffer(pages)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        self.under().install(pages, content)
    }

    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno> {
        self.under().drop_pages(pages)
    }

    fn make_inaccessible(&self, pages: &Range<u64>) -> bool {
        self.under().make_inaccessible(pages)
    }

    fn bitmap(&self) -> Option<&Bitmap> {
        self.under().bitmap()
    }
}

impl<B: OverBinding> Binding for B {
    fn arm(&self, pages: &Pages) -> Result<()> {
        OverBinding::arm(self, pages)
    }

    fn detach(&self, pages: &Pages, poisoned: &mut dyn Iterator<Item = Range<u64>>, in_use: bool) {
        self.under().detach(pages, poisoned, in_use);
    }

    fn release(&self, pages: &Range<u64>) {
        self.under().release(pages);
    }

    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno> {
        OverBinding::in_place_buffer(self, pages)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        OverBinding::install(self, pages, content)
    }

    fn resident(&self, pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        self.under().resident(pages)
    }

    fn wake(&self, pages: &Range<u64>) {
        self.under().wake(pages);
    }

    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno> {
        OverBinding::drop_pages(self, pages)
    }

    fn make_inaccessible(&self, pages: &Range<u64>) -> bool {
        OverBinding::make_inaccessible(self, pages)
    }

    fn bitmap(&self) -> Option<&Bitmap> {
        OverBinding::bitmap(self)
    }
}

impl<B: OverBinding> Reported for B {
    fn queue_at(&self, offset: u64) -> (usize, u64) {
        self.under().queue_at(offset)
    }
}

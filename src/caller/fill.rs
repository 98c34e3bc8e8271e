//! The fill callback.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi::*;

/// Fills pages. The caller implements it; closures implement it too.
///
/// The library calls it on a service thread, or on the caller's thread inside `ensure`, `vcpu_fault`, or the end of a
/// slot or handle with [`End::Populate`](crate::End::Populate). Several threads may be in it at once for different
/// runs. The library holds no lock meanwhile. It may block: other pages are served while a fill thread is free. Calls
/// that could wait for it fail with EDEADLK, on every handle. It must not touch absent guest memory, because the touch
/// would wait for this fill. A panic is caught and counts as a failed fill.
pub trait Fill: Send + Sync {
    /// Fills `run`.
    fn fill(&self, run: &mut Run<'_>) -> Filled;
}

impl<F: Fn(&mut Run<'_>) -> Filled + Send + Sync> Fill for F {
    fn fill(&self, run: &mut Run<'_>) -> Filled {
        self(run)
    }
}

/// The result of a fill callback.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// [`Run::buf`] holds the bytes of the run, or only the first ones if [`Run::set_filled`] was called.
    Done,
    /// The run is zero, or only its first bytes if [`Run::set_filled`] was called. The buffer was not written.
    Zero,
    /// The caller will call `Kuf::resolve` for every page of the run, from any thread and in any pieces. Until then the
    /// library does not ask for the run again.
    Deferred,
    /// Not now: the run stays absent. Only for a run without [`Run::is_demand`]; for a run with it this is a failure
    /// (EPROTO), so return [`Filled::Deferred`] there. A populate request or a replay continues with the next run, and
    /// ends with EAGAIN. If a thread has touched the run meanwhile, the library asks for it again at once, as demand.
    Later,
    /// The source failed, with this errno, which may be any. Where a thread is blocked, the library asks for the run
    /// again page by page, and poisons a page that fails alone.
    Failed(Errno),
}

impl From<std::io::Error> for Filled {
    /// A failure with the errno of the error; EIO if it has none.
    fn from(error: std::io::Error) -> Self {
        Self::Failed(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl<E: Into<Self>> From<Result<(), E>> for Filled {
    fn from(result: Result<(), E>) -> Self {
        result.map_or_else(Into::into, |()| Self::Done)
    }
}

/// A run of pages to fill.
pub struct Run<'a> {
    /// KUF_RUN_*.
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    /// With room for `len` bytes while the run lives.
    pub(crate) buf: NonNull<u8>,
    pub(crate) filled: u64,
    pub(crate) page_size: u64,
    pub(crate) opaque: *mut c_void,
    pub(crate) memory_offset: u64,
    /// Where the bytes are, if not in the buffer.
    pub(crate) src: *const c_void,
    /// How many bytes are at `src`, as far as that is known: not more than these go to the guest.
    pub(crate) src_len: u64,
    pub(crate) thread: u32,
    /// The value of a C callback that means nothing.
    pub(crate) unknown: Option<i32>,
    pub(crate) buffer: PhantomData<&'a mut [u8]>,
}

impl Run<'_> {
    /// The first guest physical address; a multiple of the page size.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes wanted; a multiple of the page size, not 0.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// False: at least one page is wanted.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where the run begins in its slot: the offset in an image of this slot.
    pub fn memory_offset(&self) -> u64 {
        self.memory_offset
    }

    /// Page size of the slot in bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// `Memory::tag` of the slot.
    pub fn tag(&self) -> usize {
        self.opaque.addr()
    }

    /// Whether a thread is blocked until this run is resolved.
    pub fn is_demand(&self) -> bool {
        self.flags & KUF_RUN_DEMAND != 0
    }

    /// Whether the fault is a forked child's; `gpa` is that of the parent's slot.
    pub fn is_forked(&self) -> bool {
        self.flags & KUF_RUN_FORKED != 0
    }

    /// Whether the buffer is the guest page itself, through a mapping that the guest does not see yet: nothing is copied
    /// afterwards.
    pub fn is_in_place(&self) -> bool {
        self.flags & KUF_RUN_IN_PLACE != 0
    }

    /// The thread ID of the first thread that touched the run. None: the kernel does not report it, no thread is
    /// blocked, or it is the calling thread.
    pub fn thread(&self) -> Option<u32> {
        (self.thread != 0).then_some(self.thread)
    }

    /// Where to write the bytes: `len` bytes, page-aligned. The contents at the start are undefined.
    pub fn buf(&mut self) -> &mut [u8] {
        // SAFETY: the service made room for `len` bytes of mapped memory, which the claim makes this thread's until the
        // callback returns.
        unsafe { std::slice::from_raw_parts_mut(self.buf.as_ptr(), self.len as usize) }
    }

    /// The address of [`Run::buf`]. If the run is filled in place and the result is [`Filled::Deferred`], it stays
    /// valid until the run is resolved, so that data may be received straight into it.
    /// [`End::Poison`](crate::End::Poison) takes it away.
    pub fn buf_ptr(&mut self) -> NonNull<u8> {
        self.buf
    }

    /// For [`Filled::Done`] and [`Filled::Zero`]: only the first `bytes` bytes are filled. A multiple of the page size,
    /// not 0, at most [`Run::len`]; any other value fails the fill with EPROTO. The library asks for the rest again.
    pub fn set_filled(&mut self, bytes: u64) {
        self.filled = bytes;
    }

    /// For [`Filled::Done`]: the bytes of the run are `bytes`, which the library copies to the guest from there,
    /// without [`Run::buf`]. If they are shorter than the run, only their whole pages are filled, whatever
    /// [`Run::set_filled`] says; less than one page fails the fill.
    pub fn use_static(&mut self, bytes: &'static [u8]) {
        self.src_len = bytes.len() as u64;
        let whole = self.src_len.min(self.len);
        self.set_filled(whole - whole % self.page_size);
        self.src = bytes.as_ptr().cast();
    }

    /// Limits what is filled to what is at `src`.
    pub(crate) fn keep_to_src(&mut self) {
        if !self.src.is_null() {
            self.filled = self.filled.min(self.src_len - self.src_len % self.page_size);
        }
    }

    /// As [`Run::use_static`], for memory that the caller keeps, such as a mapped image: [`Run::len`] bytes from
    /// `bytes` on, or as many as [`Run::set_filled`] says.
    ///
    /// # Safety
    /// The bytes stay where they are, unchanged, until the slot has been removed or the handle has ended (after
    /// [`Kuf::close_without_waiting`](crate::Kuf::close_without_waiting): until the fill callback is dropped). If they
    /// are unreadable, the fill fails.
    pub unsafe fn use_bytes(&mut self, bytes: *const u8) {
        (self.src, self.src_len) = (bytes.cast(), u64::MAX);
    }
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run")
            .field("gpa", &format_args!("{:#x}", self.gpa))
            .field("len", &format_args!("{:#x}", self.len))
            .field("demand", &self.is_demand())
            .field("in_place", &self.is_in_place())
            .finish_non_exhaustive()
    }
}

//! The handle behind `struct kuf *`.
//!
//! A handle is shut but never freed: for a few words per kuf_open, any thread can recognise a closed handle at any
//! later time. A list keeps the handles, so that leak checkers see them owned.

use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi::kuf_handle;
use crate::alloc::{refusable, try_box, NoMemory};
use crate::api::door::Call;
use crate::api::kuf::Kuf;
use crate::api::options::Options;
use crate::error::{Error, Result};
use crate::sync::{lock, Mutex};

const MAGIC: u64 = 0x6b75_665f_646f_6f72;

/// The object that a `struct kuf *` points to.
pub struct Handle {
    magic: u64,
    kuf: Kuf,
}

static DOORS: Mutex<Vec<&'static Handle>> = Mutex::new(Vec::new());

impl Handle {
    /// Opens a handle with the options that `make` returns for its address. The other steps that can fail come before the
    /// service is opened.
    pub fn open(make: impl FnOnce(*mut kuf_handle) -> Result<Options>) -> Result<*mut kuf_handle> {
        let handle = Self::hang()?;
        let address = std::ptr::from_ref(handle).cast_mut().cast();
        match make(address).and_then(|options| handle.kuf.start(options)) {
            Ok(()) => Ok(address),
            Err(error) => {
                handle.take_down();
                Err(error)
            }
        }
    }

    /// Makes a handle without a service.
    fn hang() -> Result<&'static Self> {
        let (kuf, mut doors) = (Kuf::unopened()?, lock(&DOORS));
        refusable(|| doors.try_reserve(1)).map_err(NoMemory::from)?;
        let handle: &'static Self = Box::leak(try_box(Self { magic: MAGIC, kuf })?);
        doors.push(handle);
        Ok(handle)
    }

    /// Removes a handle whose address kuf_open has returned to no caller. An event may have had it, but no callback runs now.
    fn take_down(&'static self) {
        lock(&DOORS).retain(|handle| !std::ptr::eq(*handle, self));
        // SAFETY: from `hang`, no longer in the list; the header says that its address is not used after a failure.
        drop(unsafe { Box::from_raw(std::ptr::from_ref(self).cast_mut()) });
    }

    /// Admits a call.
    ///
    /// # Safety
    /// `handle` is NULL or came from [`Handle::open`].
    pub unsafe fn enter(handle: *mut kuf_handle) -> Result<Call<'static>> {
        // SAFETY: the caller's promise.
        unsafe { Self::at(handle) }?.enter()
    }

    /// The handle of a call.
    ///
    /// # Safety
    /// As for [`Handle::enter`].
    pub unsafe fn at(handle: *mut kuf_handle) -> Result<&'static Kuf> {
        let handle = NonNull::new(handle.cast::<Handle>()).ok_or_else(|| Error::null("kuf"))?;
        if !handle.is_aligned() {
            return Err(not_a_handle());
        }
        // SAFETY: the caller promises that the handle came from `open`, and handles are never freed.
        let handle: &'static Handle = unsafe { handle.as_ref() };
        if handle.magic != MAGIC {
            return Err(not_a_handle());
        }
        Ok(&handle.kuf)
    }
}

fn not_a_handle() -> Error {
    Error::new(Errno::INVAL, "kuf is not a handle that kuf_open returned")
}

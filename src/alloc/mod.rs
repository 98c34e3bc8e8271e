//! Allocations that report a lack of memory instead of ending the process.
//!
//! All memory whose size a caller, a guest or a file decides is allocated here, or with `try_reserve` in `refusable`.
//! The memory for a fault is allocated before the fault is read or claimed. The small rest comes from the reserve
//! (`reserve.rs`).

#[cfg(all(not(any(loom, shuttle)), any(test, feature = "reserve")))]
pub(crate) mod reserve;
pub(crate) mod table;

use core::sync::atomic::{fence, AtomicUsize, Ordering};
use std::alloc::Layout;
use std::ptr::{self, NonNull};

use rustix::io::Errno;

#[cfg(all(not(any(loom, shuttle)), any(test, feature = "reserve")))]
pub use crate::alloc::reserve::{needed, refusable};
#[cfg(not(loom))]
use crate::sync::thread::sleep;
use crate::sync::time::Duration;

/// There is no memory for the allocation now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl From<std::collections::TryReserveError> for NoMemory {
    fn from(_: std::collections::TryReserveError) -> Self {
        Self
    }
}

impl From<NoMemory> for Errno {
    fn from(_: NoMemory) -> Self {
        Errno::NOMEM
    }
}

/// Checks that malloc has memory for a few dozen small allocations of fixed size. A call that makes a handle or a slot
/// needs them, and std makes them with no way to fail.
pub fn has_room() -> Result<(), NoMemory> {
    let mut room: Vec<u8> = Vec::new();
    room.try_reserve_exact(64 << 10)?;
    std::hint::black_box(&mut room);
    #[cfg(all(feature = "reserve", not(any(loom, shuttle))))]
    if !crate::RESERVE.is_half_free() {
        return Err(NoMemory);
    }
    Ok(())
}

/// Runs `allocate`: this build has no reserve.
#[cfg(not(all(not(any(loom, shuttle)), any(test, feature = "reserve"))))]
pub fn refusable<T>(allocate: impl FnOnce() -> T) -> T {
    allocate()
}

/// The same.
#[cfg(not(all(not(any(loom, shuttle)), any(test, feature = "reserve"))))]
pub fn needed<T>(allocate: impl FnOnce() -> T) -> T {
    allocate()
}

/// `Box::new`.
pub fn try_box<T>(value: T) -> Result<Box<T>, NoMemory> {
    const { assert!(size_of::<T>() > 0) };
    // SAFETY: the layout is not empty; the box gets memory of exactly its layout, with a value written to it.
    unsafe {
        let at = NonNull::new(refusable(|| std::alloc::alloc(Layout::new::<T>())).cast::<T>()).ok_or(NoMemory)?;
        at.write(value);
        Ok(Box::from_raw(at.as_ptr()))
    }
}

/// `Vec::push`.
pub fn try_push<T>(list: &mut Vec<T>, value: T) -> Result<(), NoMemory> {
    refusable(|| list.try_reserve(1))?;
    list.push(value);
    Ok(())
}

/// `collect`.
pub fn try_collect<T>(from: impl Iterator<Item = T>) -> Result<Vec<T>, NoMemory> {
    let mut list = Vec::new();
    refusable(|| list.try_reserve_exact(from.size_hint().0))?;
    from.into_iter().try_for_each(|value| try_push(&mut list, value))?;
    Ok(list)
}

/// `vec![0; len]`.
pub fn zeroes(len: usize) -> Result<Vec<u8>, NoMemory> {
    let mut bytes = Vec::new();
    refusable(|| bytes.try_reserve_exact(len))?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// How long a step that cannot fail waits for memory.
const PATIENCE: Duration = Duration::from_secs(2);

/// No time passes in the models.
#[cfg(loom)]
fn sleep(_: Duration) {}

/// How often [`patiently`] gave a step up because there was no memory.
static LOST: AtomicUsize = AtomicUsize::new(0);

/// Runs a step that cannot fail and for which the caller should have reserved memory. If there is none, waits for a
/// while. Err: the step was given up, which [`lost`] counts.
pub fn patiently<T>(mut attempt: impl FnMut() -> Result<T, NoMemory>) -> Result<T, NoMemory> {
    let mut waited = Duration::ZERO;
    loop {
        match attempt() {
            Err(NoMemory) if waited < PATIENCE && !cfg!(loom) => {
                const PAUSE: Duration = Duration::from_millis(1);
                sleep(PAUSE);
                waited += PAUSE;
            }
            Err(NoMemory) => {
                LOST.fetch_add(1, Ordering::Relaxed);
                return Err(NoMemory);
            }
            done => return done,
        }
    }
}

/// How often [`patiently`] gave a step up in this process because there was no memory.
pub fn lost() -> usize {
    LOST.load(Ordering::Relaxed)
}

/// A queue whose entries are allocated one by one, before they are pushed. Appending one queue to another needs no
/// memory.
pub struct List<T> {
    /// Null: the list is empty. Else from `Box::into_raw`, as is each node's `next` but the last one's, which is null.
    first: *mut Node<T>,
    /// The last node, if there is one.
    last: *mut Node<T>,
    len: usize,
}

/// Room for one entry of a [`List`].
pub struct Node<T> {
    value: Option<T>,
    next: *mut Self,
}

// SAFETY: the list owns its nodes, and nothing else has their addresses.
unsafe impl<T: Send> Send for List<T> {}
// SAFETY: as above; a shared list is only read.
unsafe impl<T: Sync> Sync for List<T> {}
// SAFETY: a node that is in no list has no next.
unsafe impl<T: Send> Send for Node<T> {}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { first: ptr::null_mut(), last: ptr::null_mut(), len: 0 }
    }
}

impl<T> List<T> {
    /// Allocates room for one entry of any list.
    pub fn room() -> Result<Box<Node<T>>, NoMemory> {
        try_box(Node { value: None, next: ptr::null_mut() })
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[cfg(any(test, loom))]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Puts an entry at the end.
    pub fn push(&mut self, value: T, mut room: Box<Node<T>>) {
        room.value = Some(value);
        let node = Box::into_raw(room);
        self.append(&mut Self { first: node, last: node, len: 1 });
    }

    /// Moves all of `more` to the end.
    pub fn append(&mut self, more: &mut Self) {
        if more.first.is_null() {
            return;
        }
        match self.first.is_null() {
            true => self.first = more.first,
            // SAFETY: the last node of a list that is not empty, which the list owns.
            false => unsafe { (*self.last).next = more.first },
        }
        self.last = more.last;
        self.len += more.len;
        (more.first, more.last, more.len) = (ptr::null_mut(), ptr::null_mut(), 0);
    }

    /// Takes out the entries that `which` accepts.
    pub fn take_if(&mut self, which: impl Fn(&T) -> bool) -> Self {
        let (mut taken, mut left) = (Self::default(), std::mem::take(self));
        while let Some(node) = left.pop_node() {
            let to = if node.value.as_ref().is_some_and(&which) { &mut taken } else { &mut *self };
            let node = Box::into_raw(node);
            to.append(&mut Self { first: node, last: node, len: 1 });
        }
        taken
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let mut next = self.first;
        std::iter::from_fn(move || {
            // SAFETY: null, or a node that the list owns; the borrow of the list rules out changes.
            let node = unsafe { next.as_ref() }?;
            next = node.next;
            node.value.as_ref()
        })
    }

    fn pop_node(&mut self) -> Option<Box<Node<T>>> {
        if self.first.is_null() {
            return None;
        }
        // SAFETY: from `Box::into_raw`, and until here only the list has it.
        let mut node = unsafe { Box::from_raw(self.first) };
        self.first = std::mem::replace(&mut node.next, ptr::null_mut());
        self.len -= 1;
        Some(node)
    }
}

impl<T> Iterator for List<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.pop_node()?.value
    }
}

impl<T> Drop for List<T> {
    fn drop(&mut self) {
        while self.pop_node().is_some() {}
    }
}

/// Bytes that can be split without memory: the parts share one allocation.
pub struct SharedBytes {
    users: NonNull<AtomicUsize>,
    from: usize,
    len: usize,
    layout: Layout,
}

// SAFETY: only `SharedBytes::new` writes the bytes.
unsafe impl Send for SharedBytes {}
// SAFETY: as above.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// Makes `len` bytes, which `write` fills. Passes its error, an errno, on.
    pub fn new(len: usize, write: impl FnOnce(NonNull<u8>) -> Result<(), Errno>) -> Result<Self, Errno> {
        let (layout, from) = Layout::new::<AtomicUsize>()
            .extend(Layout::array::<u8>(len).map_err(|_| NoMemory)?)
            .map_err(|_| NoMemory)?;
        // SAFETY: the layout is not empty: it starts with a counter.
        let users = NonNull::new(refusable(|| unsafe { std::alloc::alloc_zeroed(layout) }).cast::<AtomicUsize>())
            .ok_or(NoMemory)?;
        // SAFETY: just allocated, with a counter at its start.
        unsafe { users.write(AtomicUsize::new(1)) };
        let bytes = Self { users, from, len, layout };
        write(bytes.at())?;
        Ok(bytes)
    }

    fn at(&self) -> NonNull<u8> {
        // SAFETY: within the allocation.
        unsafe { self.users.cast::<u8>().add(self.from) }
    }

    /// Splits the bytes: keeps the first `len` and returns the rest.
    pub fn split_off(&mut self, len: usize) -> Self {
        assert!(len <= self.len, "beyond the end");
        // SAFETY: the counter exists as long as a user of the bytes does.
        unsafe { self.users.as_ref() }.fetch_add(1, Ordering::Relaxed);
        let rest = Self { from: self.from + len, len: self.len - len, ..*self };
        self.len = len;
        rest
    }
}

impl std::ops::Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `new` initialised the bytes, and they are not written afterwards.
        unsafe { std::slice::from_raw_parts(self.at().as_ptr(), self.len) }
    }
}

impl Drop for SharedBytes {
    fn drop(&mut self) {
        // SAFETY: the counter exists as long as a user of the bytes does.
        if unsafe { self.users.as_ref() }.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: allocated by `new` with this layout, and this was the last user.
            unsafe { std::alloc::dealloc(self.users.as_ptr().cast(), self.layout) };
        }
    }
}

impl std::fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_order() {
        let list = |values: std::ops::Range<u32>| {
            let mut list = List::default();
            values.for_each(|value| list.push(value, List::room().expect("memory")));
            list
        };
        let mut all = list(0..3);
        all.append(&mut list(3..3));
        all.append(&mut list(3..6));
        assert_eq!((all.len(), all.iter().copied().collect::<Vec<_>>()), (6, vec![0, 1, 2, 3, 4, 5]));
        let even = all.take_if(|value| value % 2 == 0);
        assert_eq!((even.len(), even.collect::<Vec<_>>()), (3, vec![0, 2, 4]));
        assert_eq!(all.collect::<Vec<_>>(), [1, 3, 5]);
        // Dropping the list frees its entries, which a leak checker shows.
        drop(list(0..100_000));
    }

    #[test]
    fn bytes_are_split_in_place() {
        let write = |at: NonNull<u8>| {
            // SAFETY: ten bytes.
            (0..10_u8).for_each(|n| unsafe { at.add(n.into()).write(n) });
            Ok(())
        };
        let mut head = SharedBytes::new(10, write).expect("memory");
        let mut tail = head.split_off(4);
        let end = tail.split_off(6);
        assert_eq!((&head[..], &tail[..], &end[..]), (&[0, 1, 2, 3][..], &[4, 5, 6, 7, 8, 9][..], &[][..]));
        drop(head);
        assert_eq!(tail[5], 9);
        assert_eq!(SharedBytes::new(10, |_| Err(Errno::FAULT)).err(), Some(Errno::FAULT));
        assert_eq!(SharedBytes::new(isize::MAX as usize, |_| Ok(())).err(), Some(Errno::NOMEM));
    }

    #[test]
    fn no_memory_is_an_answer() {
        assert_eq!(zeroes(isize::MAX as usize), Err(NoMemory));
        assert_eq!(try_collect(0..u64::MAX), Err(NoMemory));
        assert_eq!(try_collect(0..3_u64), Ok(vec![0, 1, 2]));
    }
}

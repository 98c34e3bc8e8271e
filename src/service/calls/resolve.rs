//! `kuf_resolve`: the caller makes pages present, whether the library asked for them or not.
//!
//! With `KUF_RESOLVE_PRESENT` pages hold their bytes already, although the library has booked them as absent. The call
//! looks for these pages twice. The first look comes before any claim, so that claims on missing pages (fills in
//! progress, or pages that the caller owes) are left alone. The second look comes with the claim made and the gate held
//! (`Content::Verify`), so that no removal comes between the look and the booking. Pages whose removal was reported are
//! *removed* by then and are not claimed; pages given back afterwards read as zero, as usual.

use std::cell::Cell;
use std::ops::Range;

use rustix::io::Errno;

use crate::alloc::{refusable, NoMemory, SharedBytes};
use crate::error::{words, Error, Result};
use crate::mechanism::Content;
use crate::memory::Slot;
use crate::os::usercopy::{copy_nofault, is_mapped, populate_read};
use crate::pages::claims::{Early, Id, Runs, Taken};
use crate::service::calls::aligned;
use crate::service::config::Resolution;
use crate::service::fault::bytes::Bytes;
use crate::service::fault::install::Failed;
use crate::service::fault::retry::{Backoff, RetryLimits};
use crate::service::fault::{settle, zero};
use crate::service::inside::{filling_here, refuse_inside_quiet};
use crate::service::queues::quiet;
use crate::service::Service;
use crate::sync::time::Instant;
use crate::sync::{thread_local, Arc};

/// Pages claimed at a time. It limits the bookkeeping, however long the range is.
const PIECE: u64 = 1 << 14;

/// Makes `gpa..gpa+len` present. Returns the bytes made so by this call.
pub fn resolve(service: &Service, gpa: u64, len: u64, how: Resolution) -> Result<u64> {
    refuse_inside_quiet("kuf_resolve")?;
    service.check_open()?;
    let map = service.memory.map();
    let (slot, offsets) = map.range(gpa, len)?;
    let pages = aligned(slot, &offsets)?;
    if matches!(how, Resolution::InPlace) && !slot.in_place() {
        let text = "KUF_RESOLVE_IN_PLACE needs a slot that is filled in place (memory->fd, minor faults)";
        return Err(Error::new(Errno::INVAL, text));
    }
    slot.check_there()?;
    // The kernel copies a single page as a whole or not at all, and reports a src that is too short.
    let whole = pages.end - pages.start == 1 && !slot.in_place();
    if let Resolution::Data(src) = how {
        if !whole {
            check_mapped(src, len)?;
        }
        map.check_not_unresolved(src, len)?;
        let by_kernel = !slot.in_place() && !slot.detects_zero;
        if by_kernel && !(whole && last_src(src)) {
            // The kernel copies from src with the gate held, and no thread may hold the gate while a disk is read, so
            // load src before. mincore cannot tell whether that is needed for a file that this process may only read.
            // The copy reports an error of src.
            let _ = populate_read(src, len as usize);
        }
    }
    if matches!(how, Resolution::Present) {
        return Ok(resolve_present(service, slot, pages)? * slot.granule);
    }
    let opened = resolve_pages(service, slot, pages.clone(), how)?;
    if slot.shared.is_none() {
        // The same bytes fill a child's private copy. The child may end at any moment, which is no error here.
        for fork in map.forks_of(slot) {
            let _ = resolve_pages(service, fork, pages.clone(), how);
        }
    }
    if let (0, true, Resolution::Data(src)) = (opened, whole, how) {
        // No page was copied, so src was not checked yet.
        check_mapped(src, len)?;
    }
    Ok(opened * slot.granule)
}

fn resolve_pages(service: &Service, slot: &Arc<Slot>, pages: Range<u64>, how: Resolution) -> Result<u64> {
    let (mut opened, mut from) = (0, pages.start);
    while from < pages.end {
        let piece = from..pages.end.min(from + PIECE);
        let (n, until) = resolve_piece(service, slot, piece, pages.start, how)?;
        opened += n;
        from = until;
    }
    Ok(opened)
}

/// Resolves as much of `pages` as there is memory for. Returns how many pages this made present, and the page up to
/// which all is done. `base`: the page that `how` starts with.
fn resolve_piece(
    service: &Service,
    slot: &Arc<Slot>,
    pages: Range<u64>,
    base: u64,
    how: Resolution,
) -> Result<(u64, u64)> {
    let taken = take(service, slot, &pages)?;
    let (until, mut waiting) = (taken.until, Backoff::default());
    let (mut opened, mut left) = resolve_taken(service, slot, taken, base, how)?;
    // Look again at pages whose callback has returned meanwhile, and at pages that another thread was resolving.
    while let Some(part) = left.pop() {
        service.check_open()?;
        waiting.pause();
        let taken = take(service, slot, &part)?;
        let rest = taken.until..part.end;
        let (n, more) = resolve_taken(service, slot, taken, base, how)?;
        opened += n;
        refusable(|| left.try_reserve(more.len() + 1)).map_err(|_| NoMemory)?;
        left.extend(more.into_iter().chain([rest]).filter(|part| !part.is_empty()));
    }
    Ok((opened, until))
}

/// Resolves the taken pages. Returns how many pages this made present, and the runs to look at again: each of them once
/// more, and no others.
fn resolve_taken(service: &Service, slot: &Arc<Slot>, taken: Taken, base: u64, how: Resolution) -> Result<(u64, Runs)> {
    let (mut opened, mut again) = (0, taken.again);
    for (n, run) in taken.install.iter().enumerate() {
        match resolve_run(service, slot, taken.id, run.clone(), base, how) {
            Ok(n) => opened += n,
            Err(errno) => {
                taken.install[n..].iter().for_each(|run| settle::abandon(service, slot, taken.id, run.clone()));
                return Err(service.ended_or(slot, errno, failure));
            }
        }
    }
    for asked in &taken.asked {
        service.stats.here().filling(asked.elapsed());
    }
    service.stats.here().bytes_populated(taken.populated * slot.granule);
    service.stats.here().bytes_ahead(taken.ahead * slot.granule);
    for run in taken.early {
        let bytes = early(slot, &run, base, how)?;
        let stashed = slot.claims_for(&(run.start..run.start), false)?.stash(run.clone(), bytes);
        if stashed.is_err() {
            refusable(|| again.try_reserve(1)).map_err(|_| NoMemory)?;
            again.push(run);
        }
    }
    Ok((opened, again))
}

/// Takes the pages that the caller may resolve, when none of `pages` is being dropped: the bytes belong to the time after
/// the drop.
fn take(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>) -> Result<Taken> {
    let mut waiting = Backoff::default();
    loop {
        let mut claims = slot.claims_for(pages, false)?;
        if claims.is_shut() && service.life.is_open() {
            return Err(slot.removed());
        }
        if !claims.dropping(pages) {
            let taken = claims.take(&slot.pages, pages.clone(), slot.in_place(), filling_here(slot));
            return if taken.until == pages.start { Err(NoMemory.into()) } else { Ok(taken) };
        }
        drop(claims);
        service.check_open()?;
        // Dropping waits for its REMOVE event to be read, and all reading threads may be in callbacks that resolve.
        quiet::wait_for_events(service, &slot.mechanism, &mut waiting);
    }
}

fn resolve_run(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    run: Range<u64>,
    base: u64,
    how: Resolution,
) -> std::result::Result<u64, Errno> {
    let content = match how {
        Resolution::Poison => {
            return Ok(settle::poison(service, slot, id, run, &Errno::IO.into(), "was given up by the caller"));
        }
        Resolution::InPlace => Content::Map,
        Resolution::Present => return book_present(service, slot, id, run),
        Resolution::Zero | Resolution::Data(_) if slot.in_place() => {
            return write_in_place(service, slot, id, run, base, how);
        }
        Resolution::Zero => Content::Zero,
        Resolution::Data(src) if slot.detects_zero => {
            let from = src.wrapping_add(((run.start - base) * slot.granule) as usize);
            return resolve_through_buffer(service, slot, id, run, from);
        }
        Resolution::Data(src) => Content::Copy(src),
    };
    // src starts at the first page of the call.
    let (opened, result) = settle::install(service, slot, id, run, Bytes::plain(content, base));
    result.map(|()| opened).map_err(|failed| failed.errno)
}

/// Writes bytes or zeroes to the pages themselves, and maps them. It writes again where a page was dropped from the
/// file in between: madvise(MADV_REMOVE) drops it some time after its event. Pages that the claim no longer owns are
/// left alone.
fn write_in_place(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    run: Range<u64>,
    base: u64,
    how: Resolution,
) -> std::result::Result<u64, Errno> {
    let (mut opened, mut left, patience) = (0, run, RetryLimits::default());
    loop {
        let held = slot.claims().held(&left, id);
        let Some(part) = held else { return Ok(opened) };
        let Some(at) = slot.binding.in_place_buffer(&part)? else { return Err(Errno::OPNOTSUPP) };
        let len = ((part.end - part.start) * slot.granule) as usize;
        let (zeroes, bytes) = match how {
            Resolution::Data(src) => {
                copy_nofault(src.wrapping_add(((part.start - base) * slot.granule) as usize), at, len)?;
                (zero::zeroes(slot, id, &part, at), Bytes::plain(Content::Map, part.start))
            }
            _ => {
                // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                unsafe { at.write_bytes(0, len) };
                (Default::default(), Bytes::zero_in_place(part.start))
            }
        };
        let bytes = Bytes { zeroes: &zeroes, ..bytes };
        let (n, result) = settle::install(service, slot, id, part.clone(), bytes);
        opened += n;
        left.start = match result {
            Ok(()) => part.end,
            Err(Failed { page, errno: Errno::FAULT }) if patience.for_memory(Instant::now()) => page,
            Err(failed) => return Err(failed.errno),
        };
    }
}

/// Copies the bytes to a buffer first, for `from` may be unreadable and only a copy can be searched for zeroes.
fn resolve_through_buffer(
    service: &Service,
    slot: &Arc<Slot>,
    id: Id,
    run: Range<u64>,
    from: *const u8,
) -> std::result::Result<u64, Errno> {
    let step = (service.config.populate_run / slot.granule).clamp(1, run.end - run.start);
    let buffer = service.buffers.take((step * slot.granule) as usize).map_err(|e| e.errno())?;
    let (mut opened, mut at, mut result) = (0, run.start, Ok(()));
    while at < run.end && result.is_ok() {
        let part = at..run.end.min(at + step);
        at = part.end;
        let src = from.wrapping_add(((part.start - run.start) * slot.granule) as usize);
        result = copy_nofault(src, buffer.at(), ((part.end - part.start) * slot.granule) as usize).and_then(|()| {
            let zeroes = &zero::zeroes(slot, id, &part, buffer.at());
            let content = Content::Copy(buffer.at().as_ptr());
            let bytes = Bytes { zeroes, ..Bytes::plain(content, part.start) };
            let (n, result) = settle::install(service, slot, id, part, bytes);
            opened += n;
            result.map_err(|failed| failed.errno)
        });
    }
    service.buffers.put(buffer);
    result.map(|()| opened)
}

/// Keeps bytes for pages to which a callback may be writing now.
fn early(slot: &Slot, run: &Range<u64>, base: u64, how: Resolution) -> Result<Early> {
    Ok(match how {
        Resolution::Zero => Early::Zero,
        Resolution::InPlace => Early::InPlace,
        Resolution::Poison => Early::Poison,
        // Only slots filled in place have early bytes, and PRESENT refuses these before.
        Resolution::Present => return Err(Error::new(Errno::INVAL, "the slot is filled in place")),
        Resolution::Data(src) => {
            let len = ((run.end - run.start) * slot.granule) as usize;
            let from = src.wrapping_add(((run.start - base) * slot.granule) as usize);
            Early::Data(SharedBytes::new(len, |to| copy_nofault(from, to, len)).map_err(failure)?)
        }
    })
}

fn failure(errno: Errno) -> Error {
    match errno {
        Errno::FAULT => Error::new(Errno::FAULT, "src is not readable over len bytes (or the bytes are not in place)"),
        Errno::NOMEM | Errno::NOSPC => Error::new(Errno::NOMEM, "the kernel has no memory for these pages"),
        Errno::SRCH => Error::new(Errno::SRCH, "the process behind this memory slot is gone"),
        errno => Error::system("making pages present", errno),
    }
}

/// Refuses a source that ends before the range, before any page is installed. The kernel finds mapped but unreadable
/// pages when it copies them.
fn check_mapped(src: *const u8, len: u64) -> Result<()> {
    is_mapped(src, len as usize)
        .map_err(|errno| Error::new(errno, words!("src is not mapped over {len:#x} bytes: nothing was resolved")))
}

/// Whether this thread's last single page came from the same src, as from a buffer that is filled again for each page:
/// then src is in memory. Asking the kernel would take a good part of the time of the page.
fn last_src(src: *const u8) -> bool {
    thread_local! {
        static LAST: Cell<usize> = const { Cell::new(0) };
    }
    LAST.replace(src.addr()) == src.addr()
}

/// Pages looked up at a time for KUF_RESOLVE_PRESENT, with the gate held.
const LOOK: u64 = 512;

/// Makes those of `pages` present that the kernel has. Returns how many pages.
fn resolve_present(service: &Service, slot: &Arc<Slot>, pages: Range<u64>) -> Result<u64> {
    if slot.in_place() {
        let text = "the slot is filled in place, where an existing page may be half-filled: name the whole ones with \
                    KUF_RESOLVE_IN_PLACE";
        return Err(Error::new(Errno::INVAL, text));
    }
    let (mut booked, mut from) = (0, pages.start);
    while let Some(first) = slot.pages.first_open(from..pages.end) {
        let part = first..pages.end.min(first + LOOK);
        from = part.end;
        for run in there(service, slot, &part)? {
            booked += resolve_pages(service, slot, run, Resolution::Present)?;
        }
    }
    Ok(booked)
}

pub fn there(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>) -> Result<Vec<Range<u64>>> {
    loop {
        let before = slot.changes();
        let found = {
            let _gate = slot.mechanism.gate().read();
            if slot.gone().is_some() {
                return Ok(Vec::new());
            }
            slot.binding.resident(pages)
        };
        if let Some(found) = found {
            return Ok(found);
        }
        let moved = quiet::changed_since(service, slot, before);
        if !moved.map_err(|errno| service.ended_or(slot, errno, |errno| Error::system("looking for pages", errno)))? {
            let text = "the library cannot see which pages another process has: KUF_RESOLVE_ZERO keeps those";
            return Err(Error::new(Errno::NOTSUP, text));
        }
    }
}

/// Books the pages of `run` that still exist, and gives up the rest. The claim `id` owns the run. Err is an errno.
fn book_present(service: &Service, slot: &Arc<Slot>, id: Id, run: Range<u64>) -> std::result::Result<u64, Errno> {
    let (mut booked, mut from) = (0, run.start);
    while from < run.end {
        let (n, result) = settle::install(service, slot, id, from..run.end, Bytes::plain(Content::Verify, from));
        booked += n;
        match result {
            Ok(()) => break,
            Err(Failed { page, errno: Errno::FAULT }) => {
                // The page was dropped since the first look.
                settle::abandon(service, slot, id, page..page + 1);
                from = page + 1;
            }
            Err(failed) => return Err(failed.errno),
        }
    }
    Ok(booked)
}

//! Getting the bytes of a claimed run: the place to write them, the fill callback or a source, and the handling of the
//! answer.

use std::ops::Range;

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::try_push;
use crate::error::{words, Failure};
use crate::mechanism::Content;
use crate::memory::{Slot, Waiter};
use crate::os::usercopy::{copy_nofault, populate_read};
use crate::pages::claims::Id;
use crate::pages::readahead::NEAR;
use crate::pages::State;
use crate::service::callbacks::Answer;
use crate::service::fault::bytes::{Bytes, Counted};
use crate::service::fault::install::Failed;
use crate::service::fault::pin::FillPin;
use crate::service::fault::place::{place_for, stage_for, FillPlace};
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{install, retry, settle, zero};
use crate::service::Service;
use crate::source::{Found, Source, Wanted};
use crate::stats::trace;
use crate::sync::time::Instant;
use crate::sync::Arc;

/// The length of an ordinary fill, in bytes: the time of a longer fill is scaled down to it.
const FEW: u64 = 16 << 10;

/// A run that the calling thread has claimed and is to fill.
pub struct Fill {
    pub slot: Arc<Slot>,
    pub id: Id,
    pub pages: Range<u64>,
    /// The page that a thread waits for; None without a waiter.
    pub wanted: Option<u64>,
    /// The thread that touched it first, or 0.
    pub thread: u32,
    /// It is filled ahead of any touch.
    pub speculative: bool,
    /// When this began.
    pub since: Instant,
    /// The limits of its waits, shared with the whole piece of work that it is part of.
    pub patience: RetryLimits,
}

impl Fill {
    /// For `thread` (0: unknown), which waits for `page`, from now on.
    pub fn demand(slot: &Arc<Slot>, id: Id, pages: Range<u64>, page: u64, thread: u32) -> Self {
        Self {
            slot: slot.clone(),
            id,
            pages,
            wanted: Some(page),
            thread,
            speculative: false,
            since: Instant::now(),
            patience: RetryLimits::default(),
        }
    }
}

/// Why a run was not filled, or not all of it.
#[derive(Debug)]
pub enum NotFilled {
    /// The source failed. No page was poisoned for it, or only pages that threads wait for.
    Failed(Failure),
    /// The source failed for the only page, which is poisoned: a thread waits for it.
    Poisoned(Failure),
    /// The callback left the run absent, with KUF_FILL_LATER.
    Later,
}

impl<F: Into<Failure>> From<F> for NotFilled {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

/// Fills a run: the only way from a claim to the caller's callback.
pub fn fill(service: &Service, run: &Fill) -> Result<(), NotFilled> {
    let Fill { slot, id, pages, wanted, speculative, .. } = run;
    let mut place = None;
    let mut moved = false;
    let result = match supply(service, run, &mut place) {
        Ok(None) => Ok(()),
        Ok(Some(Supply { n, content, counted, zeroes, since })) => {
            let done = pages.start..pages.start + n;
            if n < pages.end - pages.start {
                // Abandoned first: no thread writes there any more, and the kernel may refuse the other pages for long.
                settle::abandon(service, slot, *id, done.end..pages.end);
            }
            moved = matches!(content, Content::Move(_));
            let background = wanted.is_none() && !speculative;
            let patience = Some(&run.patience);
            let (base, wanted) = (pages.start, *wanted);
            let bytes = Bytes { content, counted, base, zeroes: &zeroes, wanted, background, since, patience };
            // In two steps, for each frame between a fault and its ioctl counts.
            let outcome = install::install(service, slot, *id, done.clone(), bytes);
            let (installed, result) = settle::after_install(service, slot, *id, &done, outcome);
            not_installed(service, run, installed, &done, result).map_err(NotFilled::from)
        }
        Err(not) => Err(not),
    };
    match place {
        Some(FillPlace::Buffer(buffer)) => service.buffers.put(buffer),
        Some(FillPlace::Staged(staging)) => service.buffers.put_staging(staging, moved),
        Some(FillPlace::InPlace { .. }) | None => {}
    }
    match result {
        Ok(()) => Ok(()),
        Err(NotFilled::Later) => Err(NotFilled::Later),
        // The claim may be in pieces by now; no thread can touch this memory any more.
        Err(not) if slot.gone().is_some() => {
            settle::abandon_quietly(service, slot, *id, pages.clone());
            Err(not)
        }
        // The source did not fail: the time limit ran out.
        Err(not) if run.patience.was_out() => {
            settle::abandon(service, slot, *id, pages.clone());
            Err(not)
        }
        Err(NotFilled::Failed(failure) | NotFilled::Poisoned(failure)) => {
            Err(fill_failed(service, run, explain(run, failure)))
        }
    }
}

/// `failure` in the words of the source, if it has become shorter or cannot be read.
fn explain(run: &Fill, failure: Failure) -> Failure {
    let unread = matches!(failure.errno(), Errno::IO | Errno::FAULT);
    let source = run.slot.source.as_ref().filter(|_| unread);
    source.and_then(|source| source.explain(&run.slot.bytes_of(&run.pages))).unwrap_or(failure)
}

/// Bytes that came for a run.
struct Supply {
    /// The count of pages, from the start of the run.
    n: u64,
    content: Content,
    counted: Counted,
    /// Pages of them that are known to be zero, in order.
    zeroes: Vec<Range<u64>>,
    /// When the bytes were complete, if that is known.
    since: Option<Instant>,
}

impl Supply {
    fn of(n: u64, bytes: Bytes<'_>, zeroes: Vec<Range<u64>>, since: Option<Instant>) -> Self {
        Self { n, content: bytes.content, counted: bytes.counted, zeroes, since }
    }
}

/// Gets the bytes of a run. None: there is nothing to install.
fn supply(service: &Service, run: &Fill, place: &mut Option<FillPlace>) -> Result<Option<Supply>, NotFilled> {
    let Fill { slot, id, pages, .. } = run;
    // The pages were resolved, or the slot was shut, before the callback was called: nothing is left to do.
    let Some(pin) = FillPin::begin(slot, *id, pages) else { return Ok(None) };
    let answer = ask(service, run, place)?;
    drop(pin);
    let now = Instant::now();
    count_time(service, run, &answer, place.as_ref(), now);
    // Time spent on zero detection counts as install time.
    let since = Some(now);
    match (answer, place.as_ref()) {
        (Answer::Filled(n), Some(place)) => {
            let zeroes = match slot.detects_zero {
                true => zero::zeroes(slot, *id, &(pages.start..pages.start + n), place.at()),
                false => Vec::new(),
            };
            let content = match place {
                FillPlace::InPlace { .. } => Content::Map,
                // A huge page has room for no other page: neither one of zeroes nor one that comes later.
                FillPlace::Staged(staging) if zeroes.is_empty() && n == pages.end - pages.start => {
                    Content::Move(staging.at().as_ptr())
                }
                FillPlace::Buffer(_) | FillPlace::Staged(_) => Content::Copy(place.at().as_ptr()),
            };
            Ok(Some(Supply::of(n, Bytes::plain(content, pages.start), zeroes, since)))
        }
        // A filled answer without a place cannot be.
        (Answer::Filled(_), None) => Err(Errno::PROTO.into()),
        (Answer::Elsewhere(n, src), _) => {
            Ok(Some(Supply::of(n, Bytes::plain(Content::Copy(src), pages.start), Vec::new(), since)))
        }
        (Answer::Zero(n), place) => Ok(Some(supply_zero(service, run, n, place)?)),
        (Answer::Deferred, _) => {
            service.stats.here().fills_deferred(1);
            slot.claims().defer(pages.clone(), *id);
            settle::settle_cancelled(service, slot, *id, pages);
            Ok(None)
        }
        (Answer::Later, _) => {
            // Threads that have touched the run meanwhile are served anew: it is asked for again, as demand.
            settle::leave_absent(service, slot, *id, pages.clone());
            Err(NotFilled::Later)
        }
        (Answer::Failed(failure), _) => {
            service.stats.here().fills_failed(1);
            settle::install_early(service, slot, *id, pages);
            Err(failure.into())
        }
    }
}

/// Asks the callback or the source. Err is an errno: there is no place to write to.
fn ask(service: &Service, run: &Fill, place: &mut Option<FillPlace>) -> Result<Answer, Errno> {
    let Fill { slot, pages, wanted, .. } = run;
    if slot.source.is_none() {
        *place = Some(place_for(service, slot, pages, &run.patience)?);
    }
    let (range, demand) = (slot.gpa_of(pages), if wanted.is_some() { KUF_RUN_DEMAND } else { 0 });
    service.stats.here().fills(1);
    trace::fill_begin(service, range, demand);
    let answer = match (&slot.source, place.as_ref()) {
        (Some(source), _) => ask_source(service, run, source.as_ref(), place),
        (None, Some(to)) => ask_caller(service, run, to, demand),
        (None, None) => Answer::Failed(Errno::PROTO.into()),
    };
    let answer = fetch(service, run, answer, place);
    let answer = match &slot.source {
        Some(source) => cut_off(run, source.as_ref(), answer),
        None => answer,
    };
    trace::fill_end(service, range, answer.traced(slot.granule));
    Ok(answer)
}

/// Counts the time that the answer took, up to `now`.
fn count_time(service: &Service, run: &Fill, answer: &Answer, place: Option<&FillPlace>, now: Instant) {
    // The time before includes the allocation of memory that is written in place.
    let since = match place {
        Some(FillPlace::InPlace { since, .. }) => *since,
        _ => run.since,
    };
    let took = now.saturating_duration_since(since);
    if run.wanted.is_some() || run.speculative {
        // Scaled to a few pages: a long run is not a slow source.
        let bytes = (run.pages.end - run.pages.start) * run.slot.granule;
        service.threads.leader.fill_took(took / (bytes / FEW).clamp(1, NEAR / FEW) as u32);
    }
    if !matches!(answer, Answer::Deferred) {
        service.stats.here().filling(took);
    }
}

/// Counts `installed`, the installed pages of `done`, and handles the failure of the rest. Err: the source failed.
fn not_installed(
    service: &Service,
    run: &Fill,
    installed: u64,
    done: &Range<u64>,
    result: Result<(), Failed>,
) -> Result<(), Failure> {
    let Fill { slot, id, wanted, speculative, .. } = run;
    let id = *id;
    match (wanted, speculative) {
        (None, true) => service.stats.here().bytes_ahead(installed * slot.granule),
        (None, false) => service.stats.here().bytes_populated(installed * slot.granule),
        _ => {}
    }
    match result {
        // The kernel refuses bytes that are good. The waiting threads are served anew, without a limit.
        Err(Failed { page, .. }) if run.patience.gave_up() => {
            settle::abandon(service, slot, id, page..done.end);
            Ok(())
        }
        Err(Failed { page, errno: Errno::CANCELED }) if service.ends(slot) => {
            settle::leave_to_the_end(service, slot, id, page..done.end);
            Ok(())
        }
        Err(Failed { page, errno: Errno::FAULT }) if slot.shared.is_some() => {
            // The bytes were dropped from the file before they were installed: they are asked for again.
            settle::abandon(service, slot, id, page..done.end);
            Ok(())
        }
        Err(Failed { errno, .. }) => Err(errno.into()),
        Ok(()) => Ok(()),
    }
}

fn ask_caller(service: &Service, run: &Fill, place: &FillPlace, demand: u32) -> Answer {
    let in_place = if matches!(place, FillPlace::InPlace { .. }) { KUF_RUN_IN_PLACE } else { 0 };
    service.config.callbacks.fill(&run.slot, run.id, &run.pages, run.thread, place.at(), in_place | demand)
}

/// Asks a built-in source, and has it read into a place if that is what it takes.
fn ask_source(service: &Service, run: &Fill, source: &dyn Source, place: &mut Option<FillPlace>) -> Answer {
    let Fill { slot, pages, wanted, .. } = run;
    let granule = slot.granule;
    let bytes = slot.bytes_of(pages);
    match source.find(&Wanted { bytes: bytes.clone(), granule, demand: wanted.is_some() }) {
        Found::Zero(len) => Answer::Zero(len / granule),
        Found::Memory(len, at) => Answer::Elsewhere(len / granule, at),
        Found::Unread(len) => {
            let n = len / granule;
            let part = bytes.start..bytes.start + len;
            let mut check = |at, len| service.memory.map().check_not_unresolved(at, len).map_err(|e| e.errno());
            if let Err(errno) = source.each_memory(&part, &mut check) {
                return Answer::Failed(errno.into());
            }
            let placed = place_for(service, slot, &(pages.start..pages.start + n), &run.patience).and_then(|new| {
                let to = place.insert(new).at();
                // SAFETY: `place` made room for these bytes, and the claim makes them this thread's.
                unsafe { source.read(&part, to) }
            });
            placed.map_or_else(|errno| Answer::Failed(errno.into()), |()| Answer::Filled(n))
        }
    }
}

/// Makes bytes in the caller's memory resident, and copies them to the place of the fill. Makes no copy where the kernel
/// itself copies them to the guest.
fn fetch(service: &Service, run: &Fill, answer: Answer, place: &mut Option<FillPlace>) -> Answer {
    let Fill { slot, id, pages, .. } = run;
    let Answer::Elsewhere(n, src) = answer else { return answer };
    let part = pages.start..pages.start + n;
    let len = n * slot.granule;
    if let Err(error) = service.memory.map().check_not_unresolved(src, len) {
        return Answer::Failed(error.into());
    }
    let unread = |errno: Errno| Answer::Failed(if errno == Errno::FAULT { unreadable(src, len) } else { errno.into() });
    if place.is_none() {
        *place = stage_for(service, slot, &part).map(FillPlace::Staged);
    }
    if !slot.in_place() && !slot.detects_zero && !matches!(place, Some(FillPlace::Staged(_))) {
        let brought = retry::patiently(service, &run.patience, || populate_read(src, len as usize));
        return brought.map_or_else(unread, |()| Answer::Elsewhere(n, src));
    }
    let to = match place {
        Some(place) => place.at(),
        None => match place_for(service, slot, &part, &run.patience) {
            Ok(new) => place.insert(new).at(),
            Err(errno) => return Answer::Failed(errno.into()),
        },
    };
    // Pages of the run that the callback itself has resolved are left out: the guest has them. The claims are unlocked: the
    // read may wait for a disk.
    let patience = &run.patience;
    let read = slot.each_held(*id, &part, |run| {
        let (at, len) = ((run.start - pages.start) * slot.granule, (run.end - run.start) * slot.granule);
        // SAFETY: within the place, which has room for the run.
        let to = unsafe { to.add(at as usize) };
        retry::patiently(service, patience, || copy_nofault(src.wrapping_add(at as usize), to, len as usize))
    });
    read.map_or_else(unread, |()| Answer::Filled(n))
}

/// The caller's bytes at `src` cannot be read.
fn unreadable(src: *const u8, len: u64) -> Failure {
    Failure::new(Errno::FAULT, words!("src {src:p} is not readable for all of `filled`, {len} bytes"))
}

/// The first `n` pages are zero. `place`: where the callback could have written.
fn supply_zero(service: &Service, run: &Fill, n: u64, place: Option<&FillPlace>) -> Result<Supply, Errno> {
    let Fill { slot, id, pages, wanted, .. } = run;
    let done = pages.start..pages.start + n;
    // The pages that are known to be zero, where that makes a difference. Without memory for the list they are written.
    let known = |known: bool| {
        let mut zeroes = Vec::new();
        let _ = known.then(|| try_push(&mut zeroes, done.clone()));
        zeroes
    };
    if !slot.in_place() {
        return Ok(Supply::of(n, Bytes::plain(Content::Zero, pages.start), known(slot.leaves_zeroes()), None));
    }
    let zeroes = known(slot.detects_zero);
    // Pages that are left out, or dropped, need no writing; a page that a thread is blocked for does.
    let write = match zeroes.as_slice() {
        [] => done.clone(),
        _ if slot.facts().gates_kvm_only => 0..0,
        _ => wanted.filter(|page| done.contains(page)).map_or(0..0, |page| page..page + 1),
    };
    if !write.is_empty() {
        let at = match place {
            // SAFETY: within the place.
            Some(place) => unsafe { place.at().add(((write.start - pages.start) * slot.granule) as usize) },
            None => settle::place_in(service, slot, &write, &run.patience)?.ok_or(Errno::PROTO)?,
        };
        // Pages of the run that the callback itself has resolved are left out: the guest has them.
        slot.each_held(*id, &write, |run| {
            let (from, len) = ((run.start - write.start) * slot.granule, (run.end - run.start) * slot.granule);
            // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
            unsafe { at.add(from as usize).write_bytes(0, len as usize) };
            Ok::<_, Errno>(())
        })?;
    }
    Ok(Supply::of(n, Bytes::zero_in_place(pages.start), zeroes, None))
}

/// The source failed for a run. Where a thread waits, the source is asked again page by page: a neighbour may be the bad
/// page.
fn fill_failed(service: &Service, run: &Fill, failure: Failure) -> NotFilled {
    let Fill { slot, id, pages, wanted, .. } = run;
    if pages.end - pages.start == 1 && wanted.is_some() {
        let why = match failure.errno() {
            Errno::EXIST => "existed before it was filled, so its bytes are not the source's",
            _ => "the source failed",
        };
        settle::poison(service, slot, *id, pages.clone(), &failure, why);
        return NotFilled::Poisoned(failure);
    }
    let mut waiters = settle::abandon_quietly(service, slot, *id, pages.clone());
    let mut next = wanted.or_else(|| waiters.iter().next().map(|waiter| waiter.page));
    while let Some(page) = next {
        let mine = waiters.take_if(|waiter: &Waiter| waiter.page == page);
        next = waiters.iter().next().map(|waiter| waiter.page);
        let thread = mine.iter().next().map_or(0, |waiter| waiter.wait.thread);
        let claimed = {
            let mut claims = slot.claims();
            let room = claims.reserve(&slot.pages, &(page..page + 1), true).is_ok();
            let terms = slot.fill_terms(true);
            let claimed = room.then(|| claims.claim(&slot.pages, page, 1, State::Absent, terms)).flatten();
            service.push_again(slot, mine.filter_map(|waiter| claims.join(waiter).err()));
            claimed
        };
        if let Some((id, pages)) = claimed {
            // One page: it is filled or poisoned.
            let patience = run.patience.clone();
            let one = Fill { patience, ..Fill::demand(slot, id, pages, page, thread) };
            let _ = fill(service, &one);
            run.patience.go_on_from(&one.patience);
        }
    }
    NotFilled::Failed(failure)
}

/// The rest of `answer` when the source was truncated meanwhile: a page that it still has in part counts as lost.
fn cut_off(run: &Fill, source: &dyn Source, answer: Answer) -> Answer {
    let Fill { slot, pages, .. } = run;
    let (Answer::Filled(n) | Answer::Elsewhere(n, _) | Answer::Zero(n)) = answer else { return answer };
    let whole = source.still_has(&slot.bytes_of(&(pages.start..pages.start + n))) / slot.granule;
    match answer {
        _ if whole == n => answer,
        _ if whole == 0 => Answer::Failed(Errno::IO.into()),
        Answer::Elsewhere(_, at) => Answer::Elsewhere(whole, at),
        Answer::Filled(_) => Answer::Filled(whole),
        _ => Answer::Zero(whole),
    }
}

//! The program that uses the library: its callbacks, and its threads, which make every call.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::ops::Range;
use std::time::Duration;

use ::kuf::sync::thread::{self, JoinHandle};
use ::kuf::sync::{lock, sim, Mutex, MutexGuard};
use ::kuf::sys::*;

use crate::kernel::{self, fill_page, Touched, PAGE};
use crate::setup::Mode;
use crate::state::{self, at_gpa, begin_change, draw, end_change, may_fail, violation, with, Doing};
use crate::trace;

/// A lock that callbacks take, and threads in madvise hold.
static HOST: Mutex<()> = Mutex::new(());

pub fn host_lock() -> MutexGuard<'static, ()> {
    lock(&HOST)
}

/// An address at which no memory can be read.
const UNREADABLE: u64 = 0x2000_0000_0000;

pub fn is_unreadable(at: u64) -> bool {
    (UNREADABLE..UNREADABLE + (1 << 32)).contains(&at)
}

/// A struct of the interface, all zero but its size.
fn sized<T>() -> T {
    // SAFETY: plain numbers and pointers, for which zero is a value.
    let mut value: T = unsafe { std::mem::zeroed() };
    // SAFETY: each of them begins with its size.
    unsafe { std::ptr::from_mut(&mut value).cast::<u32>().write(size_of::<T>() as u32) };
    value
}

fn handle() -> *mut kuf_handle {
    with(|state| state.kuf)
}

/// The source's bytes of `pages`, in memory that stays until the end of the run.
fn bytes_of(slot: usize, pages: Range<u64>) -> *const u8 {
    let words: Vec<u64> = with(|state| pages.map(|page| state.slots[slot].word(page)).collect());
    // Aligned to pages by hand.
    let mut room = vec![0_u64; (words.len() + 1) * 512].into_boxed_slice();
    let first = room.as_ptr().align_offset(PAGE as usize).min(512);
    let at = room[first..].as_mut_ptr().cast::<u8>();
    for (n, word) in words.iter().enumerate() {
        fill_page(at.wrapping_add(n * PAGE as usize), *word);
    }
    with(|state| state.arena.push(room));
    at
}

/// Checks that a call succeeded, or failed with an allowed errno.
fn expect(what: &str, code: i64, allowed: &[c_int]) {
    if code < 0 && !allowed.contains(&(-code as c_int)) {
        // SAFETY: a string of the library's.
        let text = unsafe { CStr::from_ptr(kuf_error()) }.to_string_lossy().into_owned();
        violation(&format!("{what} failed with {code}: {text}"));
    }
}

/// The errors that any call may return while the handle is being closed.
const ENDED: [c_int; 2] = [libc::EBADF, libc::ECANCELED];

fn or_ended(others: &[c_int]) -> Vec<c_int> {
    let ending = with(|state| state.closing);
    others.iter().copied().chain(ENDED.into_iter().filter(|_| ending)).collect()
}

// Callbacks.

const FILL_NOW: u64 = 0;
const FILL_SLOWLY: u64 = 1;
const FILL_LOCKED: u64 = 2;
const FILL_FAILS: u64 = 3;
const FILL_DEFERS: u64 = 4;
const FILL_PART: u64 = 5;
const FILL_POINTS: u64 = 6;
const FILL_RESOLVES: u64 = 7;
const FILL_LOST: u64 = 8;
const FILL_CALLS: u64 = 9;
const FILL_LATER: u64 = 10;
const FILL_KINDS: u64 = 11;

unsafe extern "C-unwind" fn fill(_: *mut c_void, fill: *mut kuf_fill) -> c_int {
    // SAFETY: the library's, for the time of the call.
    let fill = unsafe { &mut *fill };
    let (slot, first) = at_gpa(fill.gpa);
    let pages = first..first + fill.len / PAGE;
    let kinds = with(|state| state.setup.fill_kinds);
    let kind = draw(FILL_KINDS);
    let kind = if kinds >> kind & 1 == 0 || draw(3) == 0 { FILL_NOW } else { kind };
    trace!("fill of slot {slot} pages {pages:?}, flags {:#x}, kind {kind}", fill.flags);
    check_room(fill, slot);
    match kind {
        FILL_SLOWLY => thread::sleep(Duration::from_micros(1 + draw(3000))),
        FILL_LOCKED => drop(host_lock()),
        FILL_FAILS => {
            may_fail(slot, pages);
            return -[libc::EIO, libc::EAGAIN, libc::ENOMEM, libc::ENODEV][draw(4) as usize];
        }
        FILL_DEFERS => {
            with(|state| state.deferred.push_back((fill.gpa, fill.len)));
            return KUF_FILL_DEFERRED;
        }
        FILL_LATER => {
            if fill.flags & KUF_RUN_DEMAND != 0 {
                may_fail(slot, pages);
            }
            return KUF_FILL_LATER;
        }
        FILL_PART => fill.filled = (1 + draw(fill.len / PAGE)) * PAGE,
        FILL_POINTS => {
            fill.src = bytes_of(slot, pages).cast();
            return KUF_FILL_DONE;
        }
        FILL_LOST => {
            may_fail(slot, pages);
            fill.src = UNREADABLE as *const c_void;
            return KUF_FILL_DONE;
        }
        FILL_RESOLVES => {
            resolve_data(slot, pages);
            // The caller owes the pages that were not resolved.
            with(|state| state.deferred.push_back((fill.gpa, fill.len)));
            return KUF_FILL_DEFERRED;
        }
        FILL_CALLS => call_back(slot),
        _ => {}
    }
    let zero = with(|state| pages.clone().all(|page| state.slots[slot].word(page) == 0));
    if zero && draw(2) == 0 {
        return KUF_FILL_ZERO;
    }
    for page in pages.start..pages.start + fill.filled / PAGE {
        let word = with(|state| state.slots[slot].word(page));
        fill_page(fill.buf.cast::<u8>().wrapping_add(((page - pages.start) * PAGE) as usize), word);
        if draw(4) == 0 {
            sim::point();
        }
    }
    KUF_FILL_DONE
}

fn check_room(fill: &kuf_fill, slot: usize) {
    if fill.len == 0 || fill.len % PAGE != 0 || fill.filled != fill.len || fill.buf.is_null() || fill.kuf != handle() {
        violation("a fill callback with wrong fields");
    }
    if with(|state| state.released > 0) {
        violation("a callback after the release");
    }
    if with(|state| slot >= state.slots.len()) {
        violation("a fill of no slot");
    }
}

fn call_back(slot: usize) {
    let gpa = with(|state| state.slots[slot].gpa);
    match draw(4) {
        0 => progress(),
        1 => pending(),
        2 => stats(),
        _ => {
            let mut timeout = -1;
            std::mem::swap(&mut timeout, &mut 0);
            // SAFETY: a handle.
            let code = unsafe { kuf_ensure(handle(), gpa, PAGE, timeout) };
            expect("kuf_ensure in a fill callback", i64::from(code), &or_ended(&[libc::EDEADLK]));
            if code == 0 {
                violation("kuf_ensure in a fill callback was not refused");
            }
        }
    }
}

unsafe extern "C-unwind" fn event(_: *mut c_void, event: *const kuf_event) {
    // SAFETY: the library's, for the time of the call.
    let event = unsafe { &*event };
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(event.text) }.to_string_lossy().into_owned();
    trace!("event {}: {text}", event.kind);
    if with(|state| state.released > 0) {
        violation("an event after the release");
    }
    match event.kind {
        KUF_EVENT_FATAL => violation(&format!("the service has failed inside: {text}")),
        KUF_EVENT_GONE => violation(&format!("memory of this process is gone: {text}")),
        KUF_EVENT_COMPLETE => complete(at_gpa(event.gpa).0),
        KUF_EVENT_POISONED | KUF_EVENT_INACCESSIBLE if event.error == -libc::ECANCELED => poisoned_at_end(event),
        KUF_EVENT_POISONED | KUF_EVENT_INACCESSIBLE => poisoned(event.gpa, event.len),
        _ => {}
    }
    if draw(8) == 0 {
        thread::sleep(Duration::from_micros(draw(200)));
    }
}

fn complete(slot: usize) {
    let (now, removed) = with(|state| {
        state.slots[slot].completed += 1;
        (state.slots[slot].clone(), state.removed_any)
    });
    if removed {
        return;
    }
    if now.completed > now.may_complete {
        violation(&format!("slot {slot} was said to be complete {} times", now.completed));
    }
    if now.may_complete > 1 {
        return;
    }
    // The caller has dropped no page of the slot: each one is present, or zero because the guest gave it back.
    for page in 0..now.pages {
        let at = now.hva + page * PAGE;
        let open = kernel::with(|kernel| {
            kernel.pages.get(&at).is_some_and(|page| {
                page.right.words[..] == [now.word((at - now.hva) / PAGE)]
                    && page.right.words[0] != 0
                    && page.right.version == 0
                    && page.entry == kernel::Entry::None
                    && page.file.is_none_or(|(file, n)| !kernel.files[file].pages[n as usize])
            })
        });
        if open {
            violation(&format!("slot {slot} was said to be complete, and page {page} was never filled"));
        }
    }
}

/// One event for each call: that of a slot that is removed, or of the handle.
fn poisoned_at_end(event: &kuf_event) {
    let (slot, _) = at_gpa(event.gpa);
    let whole = with(|state| {
        let of_slot = state.slots.get(slot).is_some_and(|slot| (slot.gpa, slot.pages * PAGE) == (event.gpa, event.len));
        of_slot || state.closing && (event.gpa, event.len) == (0, 0)
    });
    if !whole {
        violation("an end of a slot or handle has an event of a part");
    }
}

fn poisoned(gpa: u64, len: u64) {
    // A slot that is added while the handle is being closed is poisoned.
    if with(|state| state.closing) {
        return;
    }
    let (slot, first) = at_gpa(gpa);
    let now = with(|state| state.slots[slot].clone());
    for page in first..first + len / PAGE {
        let wrong = |kernel: &mut kernel::Kernel| {
            let at = state::place(kernel, &now, page)?;
            kernel.pages.get(&at).map(|page| !page.right.may_fail)
        };
        if kernel::with(wrong) == Some(true) {
            violation(&format!("page {page} of slot {slot} was poisoned, and no fill of it has failed"));
        }
    }
}

unsafe extern "C-unwind" fn log(_: *mut c_void, _level: u32, text: *const c_char) {
    // SAFETY: the library's, for the time of the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    trace!("log: {text}");
}

unsafe extern "C-unwind" fn release(_: *mut c_void) {
    trace!("release");
    with(|state| state.released += 1);
}

// Opening and closing.

pub fn open() {
    let mut options: kuf_options = sized();
    with(|state| {
        let setup = &state.setup;
        options.mechanism = KUF_MECHANISM_USERFAULTFD;
        options.flags = match setup.mode {
            Mode::Source => KUF_OPEN_SOURCES,
            Mode::Direct => KUF_OPEN_DIRECT,
            Mode::Callback => 0,
            Mode::Caller => KUF_OPEN_CALLER_DRIVEN,
        } | if setup.adopt && setup.seed % 2 == 0 { KUF_OPEN_ADOPT_ONLY } else { 0 }
            | if setup.detect_zero { KUF_OPEN_DETECT_ZERO } else { 0 };
        options.fill_threads = setup.fill_threads;
        options.demand_run = setup.demand_run;
        options.populate_run = setup.populate_run;
        options.userfaultfds = if setup.adopt { 0 } else { setup.userfaultfds };
        options.spin_us = if setup.mode == Mode::Direct { 0 } else { setup.spin_us };
        options.log_level = KUF_LOG_DEBUG;
        options.end_timeout_ms = [0, 1, 20, u32::MAX][(setup.seed / 2 % 4) as usize];
        if setup.mode == Mode::Callback {
            options.fill = Some(fill);
        }
    });
    options.event = Some(event);
    options.log = Some(log);
    options.release = Some(release);
    let mut kuf = std::ptr::null_mut();
    // SAFETY: both are this thread's.
    let code = unsafe { kuf_open(&options, &mut kuf) };
    expect("kuf_open", i64::from(code), &[]);
    with(|state| state.kuf = kuf);
}

pub fn map(slot: usize) {
    let now = with(|state| state.slots[slot].clone());
    let plan = with(|state| state.setup.slots[slot].clone());
    let file = plan.shared.then(|| {
        let file = now.file.unwrap_or_else(|| {
            kernel::with(|kernel| {
                let fd = kernel.new_file(now.pages as usize);
                (kernel.files.len() - 1, fd)
            })
        });
        kernel::with(|kernel| kernel.punch(file.0, 0, now.pages));
        file
    });
    kernel::with(|kernel| kernel.map(now.hva, now.pages, file.map(|(file, _)| (file, 0))));
    with(|state| {
        let slot = &mut state.slots[slot];
        (slot.file, slot.mapped) = (file, true);
        (slot.times, slot.completed, slot.may_complete) = (slot.times + 1, 0, 1);
    });
}

/// Adds a mapped slot that holds nothing, or the pages that the plan gives its file.
pub fn add(slot: usize) -> bool {
    let (now, plan, mode) =
        with(|state| (state.slots[slot].clone(), state.setup.slots[slot].clone(), state.setup.mode));
    kernel::with(|kernel| {
        for n in 0..now.pages {
            let held = plan.held >> n & 1 != 0 && now.file.is_some();
            if let Some((file, _)) = now.file.filter(|_| held) {
                kernel.files[file].pages[n as usize] = true;
                fill_page(kernel.files[file].at.wrapping_add((n * PAGE) as usize), now.word(n) | 1);
            }
            if let Some(page) = kernel.pages.get_mut(&(now.hva + n * PAGE)) {
                page.right = crate::model::Right::new(now.word(n) | u64::from(held));
                state::inherit(slot, n, &mut page.right);
                page.lent = true;
            }
        }
    });
    let mut source: kuf_source = sized();
    let mut memory: kuf_memory = sized();
    (memory.gpa, memory.len, memory.hva) = (now.gpa, now.pages * PAGE, now.hva);
    if let Some((_, fd)) = now.file {
        memory.fd = fd;
        if plan.shared && now.held(plan.held) {
            memory.flags |= KUF_MEMORY_POPULATED;
        }
    }
    if let Some(uffd) = with(|state| state.uffd) {
        memory.uffd = uffd;
        if draw(2) == 0 {
            register(slot);
            with(|state| state.slots[slot].open = true);
            thread::sleep(Duration::from_micros(draw(100)));
        }
    }
    if mode == Mode::Source {
        source.kind = KUF_SOURCE_MEMORY;
        source.len = memory.len;
        source.addr = bytes_of(slot, 0..now.pages).cast();
        memory.source = &source;
    }
    trace!("add slot {slot}");
    // SAFETY: a handle, and structs of this thread's.
    let code = unsafe { kuf_add_memory(handle(), &memory) };
    trace!("add slot {slot}: {code}");
    expect("kuf_add_memory", i64::from(code), &or_ended(&[]));
    if code < 0 {
        may_fail(slot, 0..now.pages);
        kernel::with(|kernel| {
            lend(kernel, now.hva, now.pages, false);
            // The slot was not added: it is ordinary memory.
            for (_, page) in kernel.pages.range_mut(now.hva..now.hva + now.pages * PAGE) {
                page.right.words.push(0);
            }
        });
        if with(|state| state.uffd.is_some()) {
            poison_by_hand(slot);
        }
    }
    with(|state| {
        let slot = &mut state.slots[slot];
        (slot.added, slot.open) = (code == 0, true);
    });
    code == 0
}

/// Registers a slot before it is added: threads that touch it wait until then.
pub fn leave_outside(slot: usize) {
    let now = with(|state| state.slots[slot].clone());
    kernel::with(|kernel| {
        for n in 0..now.pages {
            if let Some(page) = kernel.pages.get_mut(&(now.hva + n * PAGE)) {
                page.right = crate::model::Right::new(now.word(n));
                page.lent = true;
            }
        }
    });
    register(slot);
    kernel::with(|kernel| lend(kernel, now.hva, now.pages, false));
    // Callers leave this slot alone.
    with(|state| (state.slots[slot].open, state.slots[slot].changing) = (true, true));
}

/// Registers a slot's memory with the caller's userfaultfd.
pub fn register(slot: usize) {
    let now = with(|state| state.slots[slot].clone());
    let Some(uffd) = with(|state| state.uffd) else { return };
    let mode = 1 | if now.file.is_some() { 4 } else { 0 };
    if let Err(errno) = kernel::uffd_register(uffd, now.hva, now.pages * PAGE, mode) {
        violation(&format!("registering by hand: {errno}"));
    }
}

/// Poisons pages that no thread will fill any more.
fn poison_by_hand(slot: usize) {
    let now = with(|state| state.slots[slot].clone());
    let Some(uffd) = with(|state| state.uffd) else { return };
    for page in 0..now.pages {
        let at = now.hva + page * PAGE;
        let what = if with(|state| state.setup.poison) { kernel::Install::Poison } else { kernel::Install::Zero };
        while let (_, Some(libc::EAGAIN | libc::ENOMEM)) = kernel::uffd_install(uffd, at, PAGE, what, kernel::By::Guest)
        {
            let_events_pass(uffd);
            thread::sleep(Duration::from_micros(20));
        }
        let _ = kernel::uffd_wake(uffd, at, PAGE);
    }
}

fn read_by_hand() -> Vec<[u64; 4]> {
    let mut messages = Vec::new();
    if let Some(uffd) = with(|state| state.uffd) {
        if let Ok(kernel::Target::Uffd(n)) = kernel::with(|kernel| kernel.target(uffd)) {
            let _ = kernel::uffd_read(n, 16, |_, message| messages.push(message));
        }
    }
    messages
}

/// Reads the events that block an install. Threads whose faults are read with them fault again.
fn let_events_pass(uffd: c_int) {
    read_by_hand().iter().filter(|message| message[0] == 0x12).for_each(|message| {
        let _ = kernel::uffd_wake(uffd, message[2], PAGE);
    });
}

/// The next handler of the caller's userfaultfd, after the library. It fills the missing pages.
pub fn start_handler() -> JoinHandle<()> {
    thread::Builder::new()
        .name("handler".to_owned())
        .spawn(|| {
            while !with(|state| state.stop) {
                for message in read_by_hand() {
                    if message[0] == 0x12 {
                        fill_by_hand(message[2]);
                    }
                }
                thread::sleep(Duration::from_micros(50));
            }
        })
        .unwrap_or_else(|error| unreachable!("{error}"))
}

fn fill_by_hand(at: u64) {
    let found =
        with(|state| state.slots.iter().position(|slot| (slot.hva..slot.hva + slot.pages * PAGE).contains(&at)));
    let (Some(slot), Some(uffd)) = (found, with(|state| state.uffd)) else { return };
    let now = with(|state| state.slots[slot].clone());
    let page = (at - now.hva) / PAGE;
    if kernel::with(|kernel| kernel.pages.get(&at).is_some_and(|page| page.entry != kernel::Entry::None)) {
        let _ = kernel::uffd_wake(uffd, at, PAGE);
        return;
    }
    loop {
        let what = kernel::with(|kernel| {
            let right = &kernel.pages.get(&at)?.right;
            let cached = now.file.is_some_and(|(file, _)| kernel.files[file].pages[page as usize]);
            Some(match (cached, right.words.contains(&0), right.words.contains(&now.word(page))) {
                (true, ..) => Ok(kernel::Install::Continue),
                (_, true, _) => Ok(kernel::Install::Zero),
                (_, _, true) => Ok(kernel::Install::Copy { src: 0 }),
                _ => Err(format!("page {page} of slot {slot} was handed over with its bytes lost: {:x?}", right.words)),
            })
        });
        let what = match what {
            Some(Ok(kernel::Install::Copy { .. })) => {
                kernel::Install::Copy { src: bytes_of(slot, page..page + 1) as u64 }
            }
            Some(Ok(what)) => what,
            Some(Err(what)) => violation(&what),
            None => return,
        };
        if !matches!(
            kernel::uffd_install(uffd, at, PAGE, what, kernel::By::Guest),
            (_, Some(libc::EAGAIN | libc::ENOMEM))
        ) {
            break;
        }
        let_events_pass(uffd);
        thread::sleep(Duration::from_micros(20));
    }
    let _ = kernel::uffd_wake(uffd, at, PAGE);
}

fn lend(kernel: &mut kernel::Kernel, hva: u64, pages: u64, lent: bool) {
    kernel.pages.range_mut(hva..hva + pages * PAGE).for_each(|(_, page)| page.lent = lent);
}

/// Closes the handle. False: the library refused.
pub fn close(flags: u32) -> bool {
    if flags & KUF_END_POISON != 0 {
        with(|state| state.poisons = true);
    }
    with(|state| state.closing = true);
    let mut kuf = handle();
    trace!("close {flags:#x}");
    // SAFETY: a handle.
    let code = unsafe { kuf_close(&mut kuf, flags) };
    trace!("close {flags:#x}: {code}");
    let mut allowed = vec![libc::EBUSY];
    if flags & KUF_END_HANDOVER != 0 {
        allowed.push(libc::EINVAL);
    }
    if flags & KUF_END_POPULATE != 0 {
        allowed.extend([libc::EIO, libc::ETIMEDOUT, libc::ENOTSUP, libc::EBUSY]);
    }
    expect("kuf_close", i64::from(code), &allowed);
    if code == 0 {
        with(|state| state.closed = true);
        if flags & KUF_END_NOWAIT == 0 {
            over();
        }
    }
    code == 0
}

/// The library has returned all memory.
pub fn over() {
    if with(|state| state.released) != 1 {
        violation("the release callback was not called once");
    }
    kernel::with(|kernel| kernel.pages.values_mut().for_each(|page| page.lent = false));
}

// Calls.

const RESOLVE: u64 = 0;
const ZERO: u64 = 1;
const POISON: u64 = 2;
const DISCARD: u64 = 3;
const DISCARD_REMOVED: u64 = 4;
const ENSURE: u64 = 5;
const POPULATE: u64 = 6;
const STOP: u64 = 7;
const PENDING: u64 = 8;
const PROGRESS: u64 = 9;
const STATS: u64 = 10;
const REPLUG: u64 = 11;
const SHORTAGE: u64 = 12;
const DEFERRED: u64 = 13;
const BAD: u64 = 14;
const RECORD: u64 = 15;
const UNMAP: u64 = 16;
const MOVE: u64 = 17;
const KINDS: u64 = 18;

pub fn start(n: u32) -> JoinHandle<()> {
    thread::Builder::new()
        .name(format!("caller-{n}"))
        .spawn(move || {
            let (steps, kinds) = with(|state| (state.setup.caller_steps, state.setup.caller_kinds));
            for _ in 0..steps {
                let kind = draw(KINDS);
                if kinds >> kind & 1 != 0 {
                    step(kind);
                    state::check_kernel();
                }
                if draw(2) == 0 {
                    thread::sleep(Duration::from_micros(draw(200)));
                }
            }
        })
        .unwrap_or_else(|error| unreachable!("{error}"))
}

/// Answers deferred runs, until the end.
pub fn start_answering() -> JoinHandle<()> {
    thread::Builder::new()
        .name("answers".to_owned())
        .spawn(|| {
            while !with(|state| state.stop) {
                answer_deferred();
                thread::sleep(Duration::from_micros(1 + draw(500)));
            }
        })
        .unwrap_or_else(|error| unreachable!("{error}"))
}

fn answer_deferred() {
    while let Some((gpa, len)) = with(|state| {
        let at = state.deferred.len().checked_sub(1).map(|last| draw(last as u64 + 1) as usize);
        at.and_then(|at| state.deferred.remove(at))
    }) {
        let (slot, first) = at_gpa(gpa);
        let (mut at, end) = (first, first + len / PAGE);
        while at < end {
            let n = 1 + draw(end - at);
            resolve_data(slot, at..at + n);
            at += n;
        }
    }
}

/// Reads and answers faults, until the end.
pub fn start_reading(n: u32) -> JoinHandle<()> {
    thread::Builder::new()
        .name(format!("reader-{n}"))
        .spawn(|| {
            while !with(|state| state.stop) {
                if !read_some() {
                    break;
                }
            }
        })
        .unwrap_or_else(|error| unreachable!("{error}"))
}

fn read_some() -> bool {
    // SAFETY: a handle.
    let code = unsafe { kuf_poll(handle(), 10) };
    expect("kuf_poll", i64::from(code), &or_ended(&[]));
    if code < 0 {
        return false;
    }
    // SAFETY: plain numbers.
    let mut faults: [kuf_fault; 4] = unsafe { std::mem::zeroed() };
    // SAFETY: a handle, and room for as many.
    let n = unsafe { kuf_read(handle(), faults.as_mut_ptr(), 1 + draw(4) as usize) };
    expect("kuf_read", n as i64, &or_ended(&[libc::EAGAIN]));
    if n < 0 {
        return !with(|state| state.closing) || n as i32 == -libc::EAGAIN;
    }
    for fault in &faults[..n as usize] {
        let (slot, page) = at_gpa(fault.gpa);
        if draw(8) == 0 {
            thread::sleep(Duration::from_micros(draw(1000)));
        }
        match draw(10) {
            0 if with(|state| state.setup.fill_kinds >> FILL_FAILS & 1 != 0) => {
                poison(slot, page..page + 1);
            }
            // Write in place only where no other thread resolves the page, for then the place is the guest's, and not
            // while the handle is being closed, for then there is no place.
            1..=4 if !fault.place.is_null() && with(|state| state.setup.callers == 0 && !state.closing) => {
                let word = with(|state| state.slots[slot].word(page));
                fill_page(fault.place.cast(), word);
                resolve(slot, page..page + 1, std::ptr::null(), KUF_RESOLVE_IN_PLACE);
            }
            _ => {
                resolve_data(slot, page..page + 1);
            }
        }
    }
    true
}

fn resolve(slot: usize, pages: Range<u64>, src: *const u8, flags: u32) -> i64 {
    let gpa = with(|state| state.slots[slot].gpa) + pages.start * PAGE;
    let len = (pages.end - pages.start) * PAGE;
    trace!("resolve slot {slot} pages {pages:?} {flags:#x}");
    // SAFETY: a handle, and bytes that stay.
    let done = unsafe { kuf_resolve(handle(), gpa, src.cast(), len as u64, flags) } as i64;
    trace!("resolve slot {slot} pages {pages:?} {flags:#x}: {done}");
    let mut these = vec![libc::ENOENT, libc::ECANCELED, libc::ENOMEM, libc::ENOSPC];
    if with(|state| state.removed_any) {
        these.extend([libc::ESRCH, libc::ERANGE]);
    }
    if flags == KUF_RESOLVE_IN_PLACE {
        // Another thread has dropped the page meanwhile.
        these.push(libc::EFAULT);
    }
    if is_unreadable(src as u64) {
        these.push(libc::EFAULT);
    }
    expect("kuf_resolve", done, &or_ended(&these));
    done
}

/// Resolves a range, and again as long as memory is short.
fn resolve_in_the_end(slot: usize, pages: Range<u64>, src: *const u8, flags: u32) -> i64 {
    loop {
        let done = resolve(slot, pages.clone(), src, flags);
        if !matches!(-done as c_int, libc::ENOMEM | libc::ENOSPC) || with(|state| state.stop) {
            return done;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn poison(slot: usize, pages: Range<u64>) {
    let change = begin_change(slot, pages.clone(), Doing::Poison);
    resolve_in_the_end(slot, pages, std::ptr::null(), KUF_RESOLVE_POISON);
    end_change(&change, None);
}

fn resolve_data(slot: usize, pages: Range<u64>) -> i64 {
    let src = bytes_of(slot, pages.clone());
    resolve_in_the_end(slot, pages, src, 0)
}

fn range() -> (usize, Range<u64>) {
    let slot = draw(with(|state| state.slots.len() as u64)) as usize;
    let pages = with(|state| state.slots[slot].pages);
    let first = draw(pages);
    (slot, first..first + 1 + draw(pages - first))
}

fn step(kind: u64) {
    let (slot, pages) = range();
    let gpa = with(|state| state.slots[slot].gpa) + pages.start * PAGE;
    let len = (pages.end - pages.start) * PAGE;
    match kind {
        RESOLVE if draw(4) == 0 && !state::without("bad-source") => {
            resolve(slot, pages, UNREADABLE as *const u8, 0);
        }
        RESOLVE => {
            resolve_data(slot, pages);
        }
        ZERO => {
            let zero = with(|state| pages.clone().all(|page| state.slots[slot].word(page) == 0));
            if zero {
                resolve(slot, pages, std::ptr::null(), KUF_RESOLVE_ZERO);
            }
        }
        POISON if draw(3) == 0 => poison(slot, pages),
        DISCARD if state::without("discard") => {}
        DISCARD_REMOVED if state::without("discard") => {}
        DISCARD => discard(slot, pages, KUF_DISCARD_REFILL),
        DISCARD_REMOVED => discard(slot, pages, KUF_DISCARD_ZERO),
        ENSURE => ensure(slot, pages),
        POPULATE => {
            let mut request: kuf_populate_request = sized();
            (request.gpa, request.len) = if draw(3) == 0 { (KUF_ALL, 0) } else { (gpa, len) };
            request.rate = if draw(3) == 0 { 50_000_000 } else { 0 };
            // SAFETY: a handle, and this thread's struct.
            let code = unsafe { kuf_populate(handle(), &request) };
            expect("kuf_populate", i64::from(code), &or_ended(&[libc::ENOTSUP, libc::ENOENT]));
        }
        STOP => {
            let mut request: kuf_populate_request = sized();
            request.flags = KUF_POPULATE_STOP;
            // SAFETY: as above.
            let code = unsafe { kuf_populate(handle(), &request) };
            expect("kuf_populate", i64::from(code), &or_ended(&[libc::ENOTSUP]));
        }
        PENDING => pending(),
        PROGRESS => progress(),
        STATS => stats(),
        REPLUG => replug(slot),
        SHORTAGE => {
            let until = sim::now() + draw(20_000_000);
            kernel::with(|kernel| kernel.short_until = until);
        }
        DEFERRED => answer_deferred(),
        BAD => bad(slot, gpa, len),
        RECORD => record(),
        UNMAP => unmap(slot),
        MOVE => shift(slot),
        _ => {}
    }
}

fn discard(slot: usize, pages: Range<u64>, flags: u32) {
    let gpa = with(|state| {
        state.slots[slot].may_complete += 1;
        state.slots[slot].gpa
    });
    let what = if flags == KUF_DISCARD_REFILL { Doing::Discard } else { Doing::Remove };
    let change = begin_change(slot, pages.clone(), what);
    trace!("discard slot {slot} pages {pages:?} {flags}");
    // SAFETY: a handle.
    let code = unsafe { kuf_discard(handle(), gpa + pages.start * PAGE, (pages.end - pages.start) * PAGE, flags) };
    trace!("discard slot {slot} pages {pages:?} {flags}: {code}");
    expect("kuf_discard", i64::from(code), &or_ended(&[libc::ENOENT, libc::ESRCH, libc::ECANCELED, libc::ENOMEM]));
    end_change(&change, (code == 0).then_some(true));
}

/// Rule 10: a call that reports success has done what it says.
fn ensure(slot: usize, pages: Range<u64>) {
    let now = with(|state| state.slots[slot].clone());
    let ats: Vec<u64> = pages.clone().map(|page| now.hva + page * PAGE).collect();
    let look = |at: &u64| {
        kernel::with(|kernel| kernel.pages.get(at).map(|page| (page.right.version, page.right.under_way.len())))
    };
    let before: Vec<_> = ats.iter().map(look).collect();
    let timeout = [0, 1, 10, -1][draw(4) as usize];
    trace!("ensure slot {slot} pages {pages:?} for {timeout} ms");
    // SAFETY: a handle.
    let code = unsafe { kuf_ensure(handle(), now.gpa + pages.start * PAGE, (pages.end - pages.start) * PAGE, timeout) };
    trace!("ensure slot {slot} pages {pages:?}: {code}");
    let allowed =
        [libc::ETIMEDOUT, libc::EHWPOISON, libc::ENOENT, libc::ESRCH, libc::EBUSY, libc::EAGAIN, libc::ECANCELED];
    expect("kuf_ensure", i64::from(code), &or_ended(&allowed));
    if code != 0 || with(|state| state.closing || state.removed_any) {
        return;
    }
    for (at, before) in ats.iter().zip(before) {
        let quiet = before.is_some_and(|(_, changes)| changes == 0) && look(at) == before;
        if !quiet {
            continue;
        }
        match kernel::with(|kernel| kernel.look(*at)) {
            None if kernel::with(|kernel| {
                kernel.pages.get(at).is_some_and(|page| {
                    // The guest has given the page back: it is zero when it is touched.
                    page.file.is_some_and(|(file, n)| kernel.files[file].pages[n as usize])
                        || page.right.words.contains(&0)
                })
            }) => {}
            None => violation(&format!("kuf_ensure has succeeded, and {at:#x} is not there")),
            // Without UFFDIO_POISON the library made the page inaccessible before the guest gave it back.
            Some(Touched::Sigbus) if !with(|state| state.setup.poison) => {}
            Some(Touched::Sigbus) => violation(&format!("kuf_ensure has succeeded, and {at:#x} is poisoned")),
            Some(touched) => crate::guest::judge(slot, *at, touched),
        }
    }
}

fn pending() {
    // SAFETY: plain numbers.
    let mut faults: [kuf_fault; 8] = unsafe { std::mem::zeroed() };
    // SAFETY: a handle, and room for as many.
    let n = unsafe { kuf_pending(handle(), faults.as_mut_ptr(), faults.len()) };
    expect("kuf_pending", n as i64, &or_ended(&[]));
}

fn progress() {
    let slot = draw(with(|state| state.slots.len() as u64 + 1)) as usize;
    let gpa = with(|state| state.slots.get(slot).map_or(KUF_ALL, |slot| slot.gpa));
    let mut out: kuf_progress_info = sized();
    // SAFETY: a handle, and this thread's struct.
    let code = unsafe { kuf_progress(handle(), gpa, &mut out) };
    expect("kuf_progress", i64::from(code), &or_ended(&[libc::ENOENT]));
    let sum = out.present + out.removed + out.absent + out.filling + out.deferred + out.poisoned;
    if code == 0 && sum != out.total {
        violation(&format!("kuf_progress adds up to {sum:#x} and not {:#x}", out.total));
    }
    let mut settings: kuf_settings_info = sized();
    // SAFETY: a handle, and this thread's struct.
    let code = unsafe { kuf_settings(handle(), gpa, &mut settings) };
    expect("kuf_settings", i64::from(code), &or_ended(&[libc::ENOENT]));
}

pub fn stats() {
    let mut out: kuf_stats_info = sized();
    // SAFETY: a handle, and this thread's struct.
    let code = unsafe { kuf_stats(handle(), &mut out) };
    expect("kuf_stats", i64::from(code), &or_ended(&[]));
    if code != 0 {
        return;
    }
    // SAFETY: plain numbers.
    let mut times: [kuf_block_time; 16] = unsafe { std::mem::zeroed() };
    // SAFETY: a handle, and room for as many.
    let n = unsafe { kuf_block_times(handle(), times.as_mut_ptr(), times.len()) };
    expect("kuf_block_times", n as i64, &or_ended(&[]));
    for time in times.iter().take(usize::try_from(n).unwrap_or(0)) {
        // A fault that is raised again after a signal counts twice if it was served before.
        let faulted = kernel::with(|kernel| kernel.faulted.get(&time.thread).copied().unwrap_or(0));
        if time.faults > 2 * faulted + 2 {
            violation(&format!("thread {} has faulted {faulted} times, and counts {}", time.thread, time.faults));
        }
    }
}

/// Reserves a slot, for one caller at a time may add, remove or move it.
fn take(slot: usize) -> bool {
    with(|state| {
        let free = !state.slots[slot].changing && !state.closing;
        if free {
            state.slots[slot].changing = true;
        }
        free
    })
}

fn give(slot: usize) {
    with(|state| state.slots[slot].changing = false);
}

fn remove(slot: usize, flags: u32) -> bool {
    let now = with(|state| {
        state.removed_any = true;
        state.slots[slot].clone()
    });
    if flags & KUF_END_POISON != 0 {
        may_fail(slot, 0..now.pages);
    }
    trace!("remove slot {slot} {flags:#x}");
    // SAFETY: a handle.
    let code = unsafe { kuf_remove_memory(handle(), now.gpa, flags) };
    trace!("remove slot {slot} {flags:#x}: {code}");
    let allowed = [libc::EBUSY, libc::EIO, libc::ETIMEDOUT, libc::ENOTSUP, libc::ENOENT];
    expect("kuf_remove_memory", i64::from(code), &or_ended(&allowed));
    if code == 0 {
        kernel::with(|kernel| lend(kernel, now.hva, now.pages, false));
        with(|state| state.slots[slot].added = false);
    }
    code == 0
}

/// A slot is unplugged, and plugged in again with memory of its own.
fn replug(slot: usize) {
    if !take(slot) {
        return;
    }
    if with(|state| state.slots[slot].added) {
        let flags = [0, KUF_END_POISON, KUF_END_POISON, KUF_END_POPULATE][draw(4) as usize];
        if !remove(slot, flags) {
            give(slot);
            return;
        }
    }
    with(|state| state.slots[slot].open = false);
    while with(|state| state.slots[slot].users > 0) {
        thread::sleep(Duration::from_micros(20));
    }
    let now = with(|state| state.slots[slot].clone());
    check_slot(slot);
    with(|state| state.slots[slot].mapped = false);
    kernel::munmap(now.hva, now.pages * PAGE);
    if with(|state| !state.closing) {
        map(slot);
        add(slot);
    }
    give(slot);
}

/// Checks the word of every page of a slot that has left the library.
pub fn check_slot(slot: usize) {
    let now = with(|state| state.slots[slot].clone());
    for page in 0..now.pages {
        let at = now.hva + page * PAGE;
        match kernel::with(|kernel| kernel.look(at)) {
            None => violation(&format!("page {page} of slot {slot} is registered still")),
            Some(Touched::Segv) if !now.mapped => {}
            Some(touched) => crate::guest::judge(slot, at, touched),
        }
    }
}

/// Unmaps the memory of a slot, and maps and adds it anew before all threads know.
fn unmap(slot: usize) {
    let direct = with(|state| state.setup.mode == Mode::Direct || !state.slots[slot].mapped);
    let direct = direct || state::without("late-unmap");
    if direct || with(|state| state.uffd.is_some()) || !take(slot) {
        return;
    }
    with(|state| (state.slots[slot].open, state.removed_any) = (false, true));
    while with(|state| state.slots[slot].users > 0) {
        thread::sleep(Duration::from_micros(20));
    }
    let now = with(|state| state.slots[slot].clone());
    with(|state| state.slots[slot].mapped = false);
    trace!("slot {slot} is unmapped");
    let unmapping = thread::spawn(move || kernel::munmap(now.hva, now.pages * PAGE));
    while kernel::with(|kernel| kernel.pages.contains_key(&now.hva)) {
        thread::yield_now();
    }
    let gone = !now.added || remove(slot, KUF_END_POISON);
    if gone && with(|state| !state.closing) {
        map(slot);
        add(slot);
    }
    let _ = unmapping.join();
    give(slot);
}

/// The memory of a slot moves, and back.
fn shift(slot: usize) {
    let not = with(|state| {
        let now = &state.slots[slot];
        state.setup.mode == Mode::Direct || state.setup.userfaultfds > 1 || !now.mapped || !now.added
    });
    if not || with(|state| state.uffd.is_some()) || !take(slot) {
        return;
    }
    with(|state| state.slots[slot].open = false);
    while with(|state| state.slots[slot].users > 0) {
        thread::sleep(Duration::from_micros(20));
    }
    let now = with(|state| state.slots[slot].clone());
    let to = now.hva ^ state::MOVED;
    // Calls in progress refer to pages by address, so do not move a slot meanwhile.
    if kernel::with(|kernel| {
        kernel.pages.range(now.hva..now.hva + now.pages * PAGE).all(|(_, page)| page.right.under_way.is_empty())
    }) {
        with(|state| state.slots[slot].hva = to);
        let moved = kernel::mremap(now.hva, now.pages * PAGE, to);
        if moved.is_err() {
            with(|state| state.slots[slot].hva = now.hva);
        }
    }
    with(|state| state.slots[slot].open = true);
    give(slot);
}

/// Rule 9: a call that fails for its arguments has changed nothing.
fn bad(slot: usize, gpa: u64, len: u64) {
    let now = with(|state| state.slots[slot].clone());
    let no_slot = 7 << 40;
    // SAFETY: a handle; the call reports the bad argument.
    let codes = unsafe {
        [
            kuf_discard(handle(), gpa + 1, len, KUF_DISCARD_REFILL),
            kuf_discard(handle(), gpa, len, 1 << 30),
            kuf_discard(handle(), no_slot, PAGE, KUF_DISCARD_REFILL),
            kuf_ensure(handle(), no_slot, PAGE, 0),
            kuf_remove_memory(handle(), no_slot, KUF_END_POISON),
            kuf_remove_memory(handle(), now.gpa, 1 << 30),
            kuf_resolve(handle(), gpa, std::ptr::null(), len, 1 << 30) as c_int,
        ]
    };
    for (n, code) in codes.iter().enumerate() {
        if *code >= 0 {
            violation(&format!("bad call {n} was not refused"));
        }
    }
}

fn record() {
    // SAFETY: a handle.
    unsafe {
        let code = kuf_record_start(handle(), 0);
        expect("kuf_record_start", i64::from(code), &or_ended(&[libc::EBUSY, libc::EALREADY, libc::ENOTSUP]));
        thread::sleep(Duration::from_micros(draw(500)));
        let fd = kernel::with(|kernel| kernel.new_text(Vec::new()));
        let code = kuf_record_stop(handle(), fd);
        expect(
            "kuf_record_stop",
            i64::from(code),
            &or_ended(&[libc::EINVAL, libc::ENOENT, libc::EALREADY, libc::ENODATA]),
        );
        if code == 0 {
            let code = kuf_replay(handle(), fd, 0);
            expect("kuf_replay", i64::from(code), &or_ended(&[libc::ENOTSUP, libc::EINVAL, libc::EBUSY, libc::ENOENT]));
        }
        let _ = kernel::with(|kernel| kernel.close(fd));
    }
}

//! Guest threads, which touch memory and give it back.

use ::kuf::sync::thread::{self, JoinHandle};
use ::kuf::sync::{sim, thread as threads};

use crate::kernel::{self, By, Touched, PAGE};
use crate::setup::{Mode, BASE};
use crate::state::{self, begin_change, draw, end_change, violation, with, Doing};
use crate::trace;

/// Whether an address is in the range of guest memory, mapped or not.
pub fn is_guest_address(at: u64) -> bool {
    (BASE..BASE + (1 << 36)).contains(&at)
}

/// The steps of guest threads.
const READ: u64 = 0;
const WRITE: u64 = 1;
const DONTNEED: u64 = 2;
const REMOVE: u64 = 3;
const FREE: u64 = 4;
const PAUSE: u64 = 5;
const LOCKED_DROP: u64 = 6;
const KINDS: u64 = 7;

pub fn start(thread: u32) -> JoinHandle<()> {
    thread::Builder::new()
        .name(format!("guest-{thread}"))
        .spawn(move || run(thread))
        .unwrap_or_else(|error| unreachable!("{error}"))
}

/// A thread that gives memory back for as long as the handle is open.
pub fn start_restless() -> JoinHandle<()> {
    thread::Builder::new()
        .name("restless".to_owned())
        .spawn(|| {
            while !with(|state| state.closed) {
                if enter(0) {
                    let pages = with(|state| state.slots[0].pages);
                    give_back(0, draw(pages), 1, libc::MADV_DONTNEED);
                    with(|state| state.slots[0].users -= 1);
                    threads::sleep(std::time::Duration::from_micros(draw(3)));
                } else {
                    threads::sleep(std::time::Duration::from_micros(50));
                }
            }
        })
        .unwrap_or_else(|error| unreachable!("{error}"))
}

fn run(thread: u32) {
    let (steps, kinds) = with(|state| (state.setup.guest_steps, state.setup.guest_kinds));
    for _ in 0..steps {
        let slot = draw(with(|state| state.slots.len() as u64)) as usize;
        let kind = draw(KINDS);
        let kind = if kinds >> kind & 1 == 0 || draw(2) == 0 { draw(2) } else { kind };
        if !enter(slot) {
            sim::point();
            threads::sleep(std::time::Duration::from_micros(draw(50)));
            continue;
        }
        step(thread, slot, kind);
        with(|state| state.slots[slot].users -= 1);
        state::check_kernel();
    }
}

/// Registers a user of the slot, which is unplugged only when it has none.
fn enter(slot: usize) -> bool {
    with(|state| {
        let slot = &mut state.slots[slot];
        if slot.open {
            slot.users += 1;
        }
        slot.open
    })
}

fn step(thread: u32, slot: usize, kind: u64) {
    let (hva, pages, direct) =
        with(|state| (state.slots[slot].hva, state.slots[slot].pages, state.setup.mode == Mode::Direct));
    let page = draw(pages);
    let at = hva + page * PAGE;
    let count = 1 + draw(pages - page);
    match kind {
        READ => read(thread, slot, at),
        WRITE => write(thread, slot, at),
        // Without events the library does not learn of it.
        DONTNEED | REMOVE | FREE | LOCKED_DROP if direct => {}
        DONTNEED => give_back(slot, page, count, libc::MADV_DONTNEED),
        REMOVE => give_back(slot, page, count, libc::MADV_REMOVE),
        FREE => give_back(slot, page, count, 8),
        LOCKED_DROP => {
            let _lock = crate::caller::host_lock();
            give_back(slot, page, count, libc::MADV_DONTNEED);
        }
        PAUSE => threads::sleep(std::time::Duration::from_micros(draw(300))),
        _ => {}
    }
}

fn patience() -> Option<u64> {
    let signals = with(|state| state.setup.signals);
    (signals != 0 && draw(2) == 0).then(|| 1 + draw(signals))
}

pub fn read(thread: u32, slot: usize, at: u64) {
    let touched = kernel::touch(thread, at, None, patience);
    trace!("guest {thread} reads {at:#x}: {touched:x?}");
    judge(slot, at, touched);
}

fn write(thread: u32, slot: usize, at: u64) {
    let word = with(|state| {
        state.next_word += 1;
        1 << 63 | u64::from(thread) << 32 | state.next_word
    });
    let touched = kernel::touch(thread, at, Some(word), patience);
    trace!("guest {thread} writes {word:#x} at {at:#x}, over {touched:x?}");
    judge(slot, at, touched);
    if let Touched::Word(_) = touched {
        kernel::with(|kernel| {
            if let Some(page) = kernel.pages.get_mut(&at) {
                page.right.written(word);
            }
        });
    }
}

/// Checks the outcome of a touch.
pub fn judge(slot: usize, at: u64, touched: Touched) {
    let poisons = with(|state| state.poisons);
    let right =
        kernel::with(|kernel| {
            let page = kernel.pages.get_mut(&at);
            match (touched, page) {
                (Touched::Word(word), Some(page)) => page.right.read(word).then_some(()).ok_or_else(|| {
                    format!("wrong bytes at {at:#x}: {word:#x}, and not one of {:x?}", page.right.words)
                }),
                (Touched::Sigbus, Some(page)) if !page.right.may_fail && !poisons => {
                    Err(format!("SIGBUS at {at:#x}, a page of which no fill has failed"))
                }
                _ => Ok(()),
            }
        });
    if let Err(what) = right {
        violation(&format!("{what} (slot {slot})"));
    }
    if touched == Touched::Segv && with(|state| state.slots[slot].mapped) {
        violation(&format!("nothing is mapped at {at:#x}"));
    }
    with(|state| state.verified += 1);
}

fn give_back(slot: usize, page: u64, count: u64, advice: libc::c_int) {
    let (hva, shared) = with(|state| (state.slots[slot].hva, state.slots[slot].file.is_some()));
    let advice = match (advice, shared) {
        (libc::MADV_REMOVE, false) => libc::MADV_DONTNEED,
        (8, true) => libc::MADV_REMOVE,
        (other, _) => other,
    };
    let change = begin_change(slot, page..page + count, Doing::GiveBack);
    let done = kernel::madvise(hva + page * PAGE, count * PAGE, advice, By::Guest);
    let kept = shared && advice == libc::MADV_DONTNEED || advice == 8;
    // A shared file keeps its bytes, and a page given back with MADV_FREE may keep them.
    end_change(&change, (done.is_ok() && !kept).then_some(true));
}

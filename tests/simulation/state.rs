//! The state that all threads of a run share.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::ops::Range;

use ::kuf::sync::sim;
use ::kuf::sys::kuf_handle;

use crate::kernel::{self, PAGE};
use crate::model::{Begun, Right};
use crate::setup::Setup;

/// The present state of a slot of the plan.
#[derive(Clone, Debug)]
pub struct SlotNow {
    pub hva: u64,
    pub pages: u64,
    pub gpa: u64,
    /// Its file, and the caller's descriptor of it.
    pub file: Option<(usize, c_int)>,
    pub mapped: bool,
    pub added: bool,
    /// Guest threads may touch it.
    pub open: bool,
    pub users: u32,
    /// A caller is adding, removing or moving it.
    pub changing: bool,
    /// How often the library may report it complete.
    pub may_complete: u32,
    pub completed: u32,
    pub times: u64,
    /// Pages that hold zeroes in the source.
    pub zeroes: u64,
}

pub struct State {
    pub setup: Setup,
    pub kuf: *mut kuf_handle,
    pub slots: Vec<SlotNow>,
    /// Runs that the callback has deferred.
    pub deferred: VecDeque<(u64, u64)>,
    /// Memory that sources and callbacks point to. It stays until the end.
    pub arena: Vec<Box<[u64]>>,
    pub released: u32,
    pub stop: bool,
    pub closing: bool,
    /// Every page may be poisoned from now on, wherever mremap(2) has it at this moment.
    pub poisons: bool,
    pub closed: bool,
    pub next_change: u64,
    /// Calls in progress that change pages of the slot that they find, even one added since they began.
    pub calls: Vec<Call>,
    pub next_word: u64,
    pub verified: u64,
    pub removed_any: bool,
    /// The caller's own userfaultfd.
    pub uffd: Option<c_int>,
}

/// A call that changes pages of a slot. The slot may have been added after the call began.
#[derive(Clone, Debug)]
pub struct Call {
    pub id: u64,
    slot: usize,
    pages: Range<u64>,
    what: Doing,
}

/// The effect of a call on pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// They hold the source's bytes.
    Discard,
    /// They become zero.
    Remove,
    /// Touching them may fail.
    Poison,
    /// A guest thread gives them back, in the present mapping.
    GiveBack,
}

impl Doing {
    /// The word that a page holds afterwards, if the call changes it.
    fn word(self, slot: &SlotNow, page: u64) -> Option<u64> {
        match self {
            Self::Discard => Some(slot.word(page)),
            Self::Remove | Self::GiveBack => Some(0),
            Self::Poison => None,
        }
    }
}

thread_local! {
    static STATE: RefCell<Option<State>> = const { RefCell::new(None) };
}

pub fn begin(setup: Setup) {
    let slots = setup
        .slots
        .iter()
        .map(|slot| SlotNow {
            hva: slot.hva,
            pages: slot.pages,
            gpa: slot.gpa,
            file: None,
            mapped: false,
            added: false,
            open: false,
            users: 0,
            changing: false,
            may_complete: 0,
            completed: 0,
            times: 0,
            zeroes: ::kuf::sync::sim::Random::new(setup.seed ^ slot.gpa).next(),
        })
        .collect();
    let state = State {
        setup,
        kuf: std::ptr::null_mut(),
        slots,
        deferred: VecDeque::new(),
        arena: Vec::new(),
        released: 0,
        stop: false,
        closing: false,
        poisons: false,
        closed: false,
        next_change: 0,
        calls: Vec::new(),
        next_word: 0,
        verified: 0,
        removed_any: false,
        uffd: None,
    };
    STATE.with(|place| *place.borrow_mut() = Some(state));
}

pub fn end() {
    STATE.with(|place| *place.borrow_mut() = None);
}

pub fn with<T>(act: impl FnOnce(&mut State) -> T) -> T {
    STATE.with(|state| act(state.borrow_mut().as_mut().expect("a run")))
}

/// The record of a call in progress.
pub struct Change {
    id: u64,
    slot: usize,
    begun: Vec<(u64, Begun)>,
}

/// The distance between the two addresses of a slot that moves.
pub const MOVED: u64 = 1 << 28;

/// Draws a number below `n`.
pub fn draw(n: u64) -> u64 {
    sim::draw(n)
}

impl SlotNow {
    /// Whether its file holds pages from the beginning.
    pub fn held(&self, pages: u64) -> bool {
        pages & ((1 << self.pages) - 1) != 0
    }

    /// The source's word for a page. Some pages are zero.
    pub fn word(&self, page: u64) -> u64 {
        if self.zeroes >> page & 3 == 0 {
            return 0;
        }
        1 << 62 | self.gpa >> 32 << 16 | page
    }
}

/// The page of a slot at a guest physical address.
pub fn at_gpa(gpa: u64) -> (usize, u64) {
    ((gpa >> 32) as usize, (gpa & 0xffff_ffff) / PAGE)
}

/// The address of a page of a slot, which mremap(2) may have moved or be about to move.
pub fn place(kernel: &kernel::Kernel, slot: &SlotNow, page: u64) -> Option<u64> {
    let at = slot.hva + page * PAGE;
    [at, at ^ MOVED].into_iter().find(|at| kernel.pages.contains_key(at))
}

/// Begins a call that changes the right words of pages, at once or when it ends.
pub fn begin_change(slot: usize, pages: Range<u64>, what: Doing) -> Change {
    let (now, id) = with(|state| {
        state.next_change += 1;
        let id = state.next_change;
        state.calls.push(Call { id, slot, pages: pages.clone(), what });
        (state.slots[slot].clone(), id)
    });
    let begun = kernel::with(|kernel| {
        pages
            .filter_map(|n| {
                let at = place(kernel, &now, n)?;
                let page = kernel.pages.get_mut(&at)?;
                page.right.may_fail |= what == Doing::Poison;
                Some((n, page.right.begin(id, what.word(&now, n)?)))
            })
            .collect()
    });
    Change { id, slot, begun }
}

/// See [`crate::model::Right::end`].
pub fn end_change(change: &Change, done: Option<bool>) {
    let now = with(|state| {
        state.calls.retain(|call| call.id != change.id);
        state.slots[change.slot].clone()
    });
    kernel::with(|kernel| {
        for (n, begun) in &change.begun {
            if let Some(page) = place(kernel, &now, *n).and_then(|at| kernel.pages.get_mut(&at)) {
                page.right.end(begun, done);
            }
        }
        // In a slot added since, the change may have happened or not.
        kernel.pages.values_mut().for_each(|page| page.right.end_inherited(change.id));
    });
}

/// Adds the effects of calls in progress to the right words of a page of a new slot.
pub fn inherit(slot: usize, page: u64, right: &mut Right) {
    with(|state| {
        let now = &state.slots[slot];
        let found = |call: &&Call| call.slot == slot && call.pages.contains(&page) && call.what != Doing::GiveBack;
        for call in state.calls.iter().filter(found) {
            right.may_fail |= call.what == Doing::Poison;
            if let Some(word) = call.what.word(now, page) {
                right.inherit(call.id, word);
            }
        }
    });
}

/// Touching these pages may fail from now on.
pub fn may_fail(slot: usize, pages: Range<u64>) {
    let now = with(|state| state.slots[slot].clone());
    kernel::with(|kernel| {
        for n in pages {
            if let Some(page) = place(kernel, &now, n).and_then(|at| kernel.pages.get_mut(&at)) {
                page.right.may_fail = true;
            }
        }
    });
}

/// Fails the run: a rule was broken.
pub fn violation(what: &str) -> ! {
    sim::fail(what)
}

/// Fails the run if the kernel has noticed a trespass.
pub fn check_kernel() {
    if let Some(what) = kernel::with(|kernel| kernel.trespass.take()) {
        violation(&what);
    }
}

/// Whether `KUF_SIM_WITHOUT` names this check: it is left out, to look for other failures.
pub fn without(check: &str) -> bool {
    std::env::var("KUF_SIM_WITHOUT").is_ok_and(|names| names.split(',').any(|name| name == check))
}

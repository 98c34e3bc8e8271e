//! The setup of a run, drawn from its seed.

use ::kuf::sync::sim::{Plan, Policy, Random};

use crate::kernel::PAGE;

/// The party that fills pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A fill callback.
    Callback,
    /// Sources, in memory.
    Source,
    /// kuf_read and kuf_resolve.
    Caller,
    /// The same, without a service thread.
    Direct,
}

#[derive(Clone, Debug)]
pub struct SlotPlan {
    pub gpa: u64,
    pub pages: u64,
    pub hva: u64,
    pub shared: bool,
    /// Pages that the shared file holds from the beginning.
    pub held: u64,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub mode: Mode,
    pub fill_threads: u32,
    pub demand_run: u64,
    pub populate_run: u64,
    pub spin_us: u32,
    pub userfaultfds: u32,
    pub detect_zero: bool,
    pub poison: bool,
    pub slots: Vec<SlotPlan>,
    pub guests: u32,
    pub guest_steps: u64,
    pub callers: u32,
    pub caller_steps: u64,
    /// A blocked thread gets a signal after at most this many nanoseconds; 0: none.
    pub signals: u64,
    /// The kinds of steps that guests and callers take, as bits: this run leaves the others out.
    pub guest_kinds: u64,
    pub caller_kinds: u64,
    pub fill_kinds: u64,
    /// The handle is closed while the other threads work.
    pub close_early: bool,
    pub close_flags: u32,
    pub rare: u64,
    /// The kernel gives false answers now and then.
    pub lies: bool,
    /// Slots use the caller's userfaultfd; the last of several slots is registered and may never be added.
    pub adopt: bool,
    pub outside: bool,
    /// A thread gives memory back for as long as the handle is open.
    pub restless: bool,
}

/// The address of guest memory, where this process maps nothing.
pub const BASE: u64 = 0x1000_0000_0000;
/// The library's userfaultfds alternate at multiples of this.
const STRIPE: u64 = 16 << 20;

/// Draws a set of kinds: each with a chance of one half or so, and those in `always` for certain.
fn kinds(random: &mut Random, always: u64) -> u64 {
    let drawn = random.next();
    match random.below(4) {
        0 => u64::MAX,
        1 => drawn & random.next() | always,
        _ => drawn | always,
    }
}

pub fn plan(seed: u64) -> (Plan, Setup) {
    let mut random = Random::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mode = match random.below(8) {
        0..=3 => Mode::Callback,
        4 => Mode::Source,
        5..=6 => Mode::Caller,
        _ => Mode::Direct,
    };
    let one_of = |random: &mut Random, values: &[u64]| values[random.below(values.len() as u64) as usize];
    let n_slots = 1 + random.below(3);
    let mut slots = Vec::new();
    for n in 0..n_slots {
        let pages = one_of(&mut random, &[1, 2, 4, 8, 16]);
        let straddle = random.below(pages + 1) * PAGE;
        let hva = BASE + (n << 30) + 4 * STRIPE - straddle;
        let shared = random.below(3) == 0;
        let held = if shared && random.below(3) == 0 { random.next() } else { 0 };
        slots.push(SlotPlan { gpa: n << 32, pages, hva, shared, held });
    }
    let policy = match random.below(3) {
        0 => {
            let depth = 1 + random.below(6);
            let most = 1000 << random.below(6);
            let mut changes: Vec<_> = (0..depth).map(|_| random.below(most)).collect();
            changes.sort_unstable();
            Policy::Priorities { changes }
        }
        _ => Policy::Walk { change: one_of(&mut random, &[1, 2, 4, 10, 50]) },
    };
    let plan = Plan {
        seed,
        policy,
        jump: one_of(&mut random, &[0, 50, 200, 2000]),
        spurious: one_of(&mut random, &[0, 0, 20, 100, 1000]),
        most_steps: 2_000_000,
    };
    let adopt = mode != Mode::Direct && random.below(5) == 0;
    let setup = Setup {
        seed,
        mode,
        fill_threads: 1 + random.below(3) as u32,
        demand_run: one_of(&mut random, &[PAGE, PAGE, 2 * PAGE, 4 * PAGE, 0]),
        populate_run: one_of(&mut random, &[PAGE, 2 * PAGE, 4 * PAGE, 0]),
        spin_us: one_of(&mut random, &[0, 0, 20]) as u32,
        userfaultfds: if mode == Mode::Direct { 1 } else { 1 + random.below(2) as u32 },
        detect_zero: random.below(4) == 0,
        poison: random.below(8) != 0,
        slots,
        guests: 1 + random.below(4) as u32,
        guest_steps: one_of(&mut random, &[2, 6, 12, 25]),
        callers: random.below(4) as u32,
        caller_steps: one_of(&mut random, &[2, 5, 10]),
        signals: one_of(&mut random, &[0, 0, 20_000, 1_000_000]),
        guest_kinds: kinds(&mut random, 3),
        caller_kinds: kinds(&mut random, 0),
        fill_kinds: kinds(&mut random, 1),
        close_early: random.below(3) == 0,
        close_flags: one_of(&mut random, if adopt { &[1, 8, 8] } else { &[1, 1, 1, 3, 5, 0] }) as u32,
        rare: one_of(&mut random, &[0, 30, 6]),
        adopt,
        outside: adopt && n_slots > 1 && random.below(2) == 0,
        restless: mode != Mode::Direct && random.below(4) == 0,
        lies: random.below(3) == 0,
    };
    (plan, setup)
}

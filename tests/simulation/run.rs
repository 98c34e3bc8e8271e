//! Runs seeds, one after the other.

use std::cell::Cell;
use std::time::{Duration, Instant};

use ::kuf::sync::sim::{self, Outcome};
use ::kuf::sync::thread;
use ::kuf::sys::*;

use crate::setup::{plan, Mode};
use crate::state::{self, violation, with};
use crate::{caller, guest, kernel};

std::thread_local! {
    static TRACE: Cell<bool> = const { Cell::new(false) };
    static SEED: Cell<u64> = const { Cell::new(0) };
}

pub fn tracing() -> bool {
    TRACE.get()
}

/// Prints an event when the run traces one seed.
#[macro_export]
macro_rules! trace {
    ($($text:tt)*) => {
        if $crate::run::tracing() {
            let (now, name) = (::kuf::sync::sim::now() - 1_000_000_000, ::kuf::sync::sim::name());
            eprintln!("{:>9}.{:03} {name:14} {}", now / 1000, now % 1000, format_args!($($text)*));
        }
    };
}

fn failed(report: &str) -> ! {
    let seed = SEED.get();
    eprintln!("simulation: seed {seed}: {report}");
    eprintln!("again, with what happened: KUF_SIM_TRACE=1 tests/check/simulate.sh {seed}");
    // Exit without cleaning up, for the tasks cannot end.
    std::process::exit(1)
}

/// UFFD_FEATURE_*: all but MOVE. The library asks once per process.
const OFFERED: u64 = (1 << 15) - 1;

fn one(seed: u64) -> (Outcome, u64) {
    SEED.set(seed);
    let (plan, mut setup) = plan(seed);
    setup.outside &= !state::without("parked");
    setup.restless &= !state::without("restless");
    setup.lies &= !state::without("lies");
    setup.adopt &= !state::without("adopt");
    // The library keeps faults in memory of no slot only under an adopted userfaultfd.
    setup.outside &= setup.adopt;
    if tracing() {
        eprintln!("{plan:?}\n{setup:#?}");
    }
    kernel::boot(OFFERED, setup.poison, setup.rare, setup.lies);
    state::begin(setup);
    let outcome = sim::run(plan, failed, body);
    let verified = with(|state| state.verified);
    state::end();
    kernel::halt();
    (outcome, verified)
}

fn body() {
    let setup = with(|state| state.setup.clone());
    caller::open();
    if setup.adopt {
        let fd = kernel::with(|kernel| kernel.new_uffd());
        if kernel::with(|kernel| kernel.uffd_api(fd, OFFERED & !(1 << 1))).is_err() {
            violation("UFFDIO_API by hand");
        }
        with(|state| state.uffd = Some(fd));
    }
    for slot in 0..setup.slots.len() {
        caller::map(slot);
        if setup.outside && slot + 1 == setup.slots.len() {
            caller::leave_outside(slot);
        } else {
            caller::add(slot);
        }
    }
    let mut answering = Vec::new();
    match setup.mode {
        Mode::Callback => answering.push(caller::start_answering()),
        Mode::Caller | Mode::Direct => answering.extend((0..1 + setup.fill_threads / 2).map(caller::start_reading)),
        Mode::Source => {}
    }
    let mut working: Vec<_> = (1..=setup.guests).map(guest::start).collect();
    working.extend((0..setup.callers).map(caller::start));
    let restless = setup.restless.then(guest::start_restless);
    if setup.close_early || setup.outside {
        thread::sleep(Duration::from_micros(sim::draw(2000)));
    } else {
        join(&mut working);
        caller::stats();
    }
    // The answering threads go on until the handle is closed.
    let mut flags = setup.close_flags;
    while !caller::close(flags) {
        flags = KUF_END_POISON;
    }
    if setup.adopt {
        answering.push(caller::start_handler());
    }
    working.extend(restless);
    join(&mut working);
    with(|state| state.stop = true);
    join(&mut answering);
    at_the_end();
}

fn join(threads: &mut Vec<thread::JoinHandle<()>>) {
    for thread in threads.drain(..) {
        if let Err(panic) = thread.join() {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            violation(&format!("a thread has panicked: {}", text.unwrap_or_default()));
        }
    }
}

/// Checks that the library has left nothing behind.
fn at_the_end() {
    let until = sim::now() + 100_000_000_000;
    // With KUF_END_NOWAIT service threads may still work, but not for ever.
    while with(|state| state.released) == 0 {
        thread::sleep(Duration::from_millis(1));
        if sim::now() > until {
            violation("the release callback does not come");
        }
    }
    caller::over();
    let files: Vec<_> = with(|state| state.slots.iter().filter_map(|slot| slot.file).collect());
    if let Some(uffd) = with(|state| state.uffd) {
        kernel::with(|kernel| kernel.close(uffd).unwrap_or(()));
    }
    kernel::with(|kernel| files.iter().for_each(|(_, fd)| kernel.close(*fd).unwrap_or(())));
    // The last thread of the library closes its descriptors after the release.
    while kernel::with(|kernel| !kernel.fds.is_empty()) && sim::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    if let Some((fd, target)) = kernel::with(|kernel| kernel.fds.iter().next().map(|(fd, target)| (*fd, *target))) {
        violation(&format!("descriptor {fd} is left over: {target:?}"));
    }
    for slot in 0..with(|state| state.slots.len()) {
        // The next handler may have changed a slot that was handed over.
        if with(|state| state.slots[slot].mapped && state.uffd.is_none()) {
            caller::check_slot(slot);
        }
    }
    state::check_kernel();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Runs a few seeds first, for the library probes some things once per process.
fn warm_up() {
    for seed in 0..4 {
        one(u64::MAX - seed);
    }
}

pub fn main() {
    let (seed, trace) = (number("KUF_SIM_SEED"), std::env::var_os("KUF_SIM_TRACE").is_some());
    TRACE.set(trace && seed > Some(u64::MAX - 8));
    warm_up();
    TRACE.set(trace);
    if let Some(seed) = seed {
        let (outcome, verified) = one(seed);
        println!("simulation: seed {seed}: {verified} touches verified, {outcome:?}");
        return;
    }
    let (from, count) = (number("KUF_SIM_FROM").unwrap_or(1), number("KUF_SIM_RUNS").unwrap_or(u64::MAX));
    let seconds = number("KUF_SIM_SECONDS").unwrap_or(10);
    let (begun, mut runs, mut sum, mut steps) = (Instant::now(), 0, 0, 0);
    while runs < count && begun.elapsed() < Duration::from_secs(seconds) {
        let (outcome, verified) = one(from + runs);
        if runs % 1000 == 0 && one(from + runs).0 != outcome {
            failed("a seed that was run twice has not done the same");
        }
        (runs, sum, steps) = (runs + 1, sum + verified, steps + outcome.steps);
    }
    let end = from + runs.saturating_sub(1);
    println!(
        "simulation: {runs} runs (seeds {from} to {end}), {sum} touches verified, {steps} steps, {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

//! Filling ahead of demand, in the background and behind all of it: ranges, and recordings before them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::config::NewPopulate;
use super::fill::Run;
use super::host::refuse_inside_quiet;
use super::{huge, replay, Service, Work};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::memory::{Map, Slot};
use crate::pages::State;
use crate::record::Recording;
use crate::sync::{lock, Condvar, Mutex};

/// How often populate looks again for what it waits for: demand to be served, deferred runs to come back.
const LOOK: Duration = Duration::from_micros(200);

/// How many times as long as its last run took populate waits at most for demand to be served.
const SHARE: u32 = 16;

/// How often a range is gone through for pages that became absent behind the scan.
const ROUNDS: u32 = 8;

/// Err is an errno.
pub type Step = std::result::Result<(), i32>;

/// What is done with each part of what is to be filled.
pub type Act<'a> = dyn FnMut(&Arc<Slot>, &Range<u64>) -> Step + 'a;

/// Requests that wait.
#[derive(Default)]
pub struct Queue {
    state: Mutex<Requests>,
    changed: Condvar,
}

#[derive(Default)]
struct Requests {
    requests: VecDeque<NewPopulate>,
    /// Before those.
    replays: VecDeque<Recording>,
    /// Slots that are complete, so that what it costs to catch touches may be saved.
    complete: Vec<Arc<Slot>>,
    /// Counts KUF_POPULATE_STOP: a request that began under another number ends.
    era: u64,
}

impl Requests {
    /// A recording to be filled now. Not before a sweep, whose pages somebody may be waiting for.
    fn next_replay(&mut self) -> Option<(Recording, u64)> {
        if self.replays.is_empty() || self.requests.iter().any(|request| request.sweep) {
            return None;
        }
        self.replays.pop_front().map(|recording| (recording, self.era))
    }
}

impl Queue {
    /// Has a recording filled.
    pub fn replay(&self, recording: Recording) {
        lock(&self.state).replays.push_back(recording);
        self.changed.notify_all();
    }

    /// Has the thread that works on it tell the mechanism of a complete slot: that may take time.
    pub fn save_costs_of(&self, slot: &Arc<Slot>) {
        lock(&self.state).complete.push(slot.clone());
        self.changed.notify_all();
    }

    /// Wakes the thread that works on it.
    pub fn wake(&self) {
        let _state = lock(&self.state);
        self.changed.notify_all();
    }
}

enum Job {
    Populate(NewPopulate, u64),
    Replay(Recording, u64),
    SaveCosts(Arc<Slot>),
}

/// What to do about a page that cannot be filled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnFailure {
    /// End the request.
    End,
    /// Leave it and go on.
    Leave,
    /// Poison it, for somebody may be waiting, and go on.
    Poison,
}

/// What is to be filled.
enum Target<'a> {
    Runs(Vec<(Arc<Slot>, Range<u64>)>),
    Recording(&'a Recording, Arc<Map>),
}

/// How a target is filled.
struct Ahead<'a> {
    pace: Pace,
    stop: &'a dyn Fn(&Service) -> bool,
    on_failure: OnFailure,
    /// Recordings that come meanwhile go first.
    gives_way: bool,
    /// What the last run took.
    took: Duration,
}

/// What a request may do without asking again.
struct Pace {
    started: Instant,
    /// Bytes per second; 0: no limit.
    rate: u64,
    bytes: u64,
}

impl Pace {
    fn due(&self) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(self.bytes as f64 / self.rate as f64).saturating_sub(self.started.elapsed())
    }
}

impl Service {
    /// `kuf_populate`.
    pub fn populate(&self, request: NewPopulate) -> Result<()> {
        refuse_inside_quiet("kuf_populate")?;
        self.check_open()?;
        if !self.serviced() {
            return Err(Error::new(libc::ENOTSUP, "kuf_populate needs a fill callback to ask, or sources"));
        }
        let mut state = lock(&self.populate.state);
        if request.stop {
            state.era += 1;
            let (sweeps, stopped) = std::mem::take(&mut state.requests).into_iter().partition(|r| r.sweep);
            state.requests = sweeps;
            for request in stopped {
                self.push(populated(request.range, libc::ECANCELED));
            }
            for _ in std::mem::take(&mut state.replays) {
                self.push(replayed(libc::ECANCELED));
            }
        } else if !(request.sweep && state.requests.iter().any(|other| other.sweep)) {
            if self.runs(request.range).is_empty() {
                return Err(Error::new(libc::ENOENT, "no memory slot in this range"));
            }
            state.requests.push_back(request);
        }
        self.populate.changed.notify_all();
        Ok(())
    }

    pub(super) fn populate_loop(self: &Arc<Self>) {
        while let Some(job) = self.next_job() {
            match job {
                Job::Populate(request, era) => self.work_on_request(&request, era),
                Job::Replay(recording, era) => self.work_on_replay(&recording, era),
                Job::SaveCosts(slot) => slot.mechanism.completed(&slot),
            }
        }
    }

    fn work_on_request(&self, request: &NewPopulate, era: u64) {
        let pace = Pace { started: Instant::now(), rate: request.rate, bytes: 0 };
        let sweep = request.sweep;
        let stop =
            |service: &Service| service.check_open().is_err() || !sweep && lock(&service.populate.state).era != era;
        let on_failure = if sweep { OnFailure::Poison } else { OnFailure::End };
        let mut ahead = Ahead { pace, stop: &stop, on_failure, gives_way: !sweep, took: LOOK };
        let result = self.fill_target(&Target::Runs(self.runs(request.range)), &mut ahead);
        if self.check_open().is_ok() && !sweep {
            self.push(populated(request.range, result.err().unwrap_or(0)));
        }
    }

    fn work_on_replay(&self, recording: &Recording, era: u64) {
        let pace = Pace { started: Instant::now(), rate: 0, bytes: 0 };
        let stop = |service: &Service| service.check_open().is_err() || lock(&service.populate.state).era != era;
        let mut ahead = Ahead { pace, stop: &stop, on_failure: OnFailure::End, gives_way: false, took: LOOK };
        let result = self.fill_target(&Target::Recording(recording, self.memory.map()), &mut ahead);
        if self.check_open().is_ok() {
            self.push(replayed(result.err().unwrap_or(0)));
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = lock(&self.populate.state);
        loop {
            self.check_open().ok()?;
            if let Some(slot) = state.complete.pop() {
                return Some(Job::SaveCosts(slot));
            }
            if let Some((recording, era)) = state.next_replay() {
                return Some(Job::Replay(recording, era));
            }
            if let Some(request) = state.requests.pop_front() {
                return Some(Job::Populate(request, state.era));
            }
            state = self.populate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fills everything there is, on this thread, for `kuf_close` and `kuf_remove_memory`.
    pub(super) fn populate_now(&self, range: Option<(u64, u64)>) -> Step {
        let pace = Pace { started: Instant::now(), rate: 0, bytes: 0 };
        let stop = |service: &Service| service.check_open().is_err();
        let mut ahead = Ahead { pace, stop: &stop, on_failure: OnFailure::Leave, gives_way: false, took: LOOK };
        self.fill_target(&Target::Runs(self.runs(range)), &mut ahead)
    }

    fn fill_target(&self, target: &Target<'_>, ahead: &mut Ahead<'_>) -> Step {
        let stop = ahead.stop;
        let go_on = || if stop(self) { Err(libc::ECANCELED) } else { Ok(()) };
        // A fill that a discard has overtaken leaves its page absent behind this. A host that discards all the while
        // does not keep a request from ending.
        for _ in 0..ROUNDS {
            let mut failed = Ok(());
            let mut fill = |slot: &Arc<Slot>, pages: &Range<u64>| match self.fill_ahead(slot, pages, ahead) {
                Err(errno) if ahead.on_failure != OnFailure::End && errno != libc::ECANCELED => {
                    failed = Err(errno);
                    Ok(())
                }
                other => other,
            };
            match target {
                Target::Recording(recording, map) => self.each_window(recording, map, &go_on, &mut fill)?,
                Target::Runs(_) => target.each(&go_on, &mut fill)?,
            }
            // Deferred runs and those that demand is filling are part of the request.
            target.each(&go_on, &mut |slot, pages| {
                while self.on_their_way(slot, pages) {
                    go_on()?;
                    self.give_way(ahead);
                    let claims = slot.claims();
                    drop(slot.sleep(claims, Some(Instant::now() + Duration::from_millis(20))));
                }
                Ok(())
            })?;
            failed?;
            let mut left = false;
            target.each(&go_on, &mut |slot, pages| {
                left |= has_absent(slot, pages);
                Ok(())
            })?;
            if !left {
                break;
            }
        }
        Ok(())
    }

    fn fill_ahead(&self, slot: &Arc<Slot>, pages: &Range<u64>, ahead: &mut Ahead<'_>) -> Step {
        let mut failed = Ok(());
        let mut from = pages.start;
        while has_absent(slot, &(from..pages.end)) {
            self.let_demand_pass(slot, ahead);
            if (ahead.stop)(self) {
                return Err(libc::ECANCELED);
            }
            if let Some(errno) = slot.gone() {
                return Err(errno);
            }
            let max = if failed.is_ok() { (self.config.populate_run / slot.granule).max(1) } else { 1 };
            let Some(mut run) = self.claim_ahead(slot, from..pages.end, max) else { return failed };
            if ahead.on_failure == OnFailure::Poison && max == 1 {
                run.wanted = Some(run.pages.start);
            }
            from = run.pages.start;
            let filled = self.fill(&run);
            ahead.took = run.since.elapsed();
            if let Err(errno) = filled {
                failed = Err(errno);
                if ahead.on_failure == OnFailure::End {
                    return failed;
                }
                // A run is tried again page by page; a page that fails is left.
                from += u64::from(run.pages.end - run.pages.start == 1);
            }
            ahead.pace.bytes += (run.pages.end - run.pages.start) * slot.granule;
        }
        failed
    }

    /// Recordings that have come since are for what is wanted first.
    fn give_way(&self, ahead: &Ahead<'_>) {
        if !ahead.gives_way {
            return;
        }
        let next = || lock(&self.populate.state).next_replay();
        while let Some((recording, era)) = next() {
            self.work_on_replay(&recording, era);
        }
    }

    fn on_their_way(&self, slot: &Arc<Slot>, pages: &Range<u64>) -> bool {
        slot.pages.first_open(pages.clone()).is_some() && {
            let claims = slot.claims();
            slot.gone().is_none() && claims.open(pages)
        }
    }

    /// Demand first, and no more ahead of the source than was agreed.
    fn let_demand_pass(&self, slot: &Arc<Slot>, ahead: &Ahead<'_>) {
        let mut since = None;
        // Demand that never ends does not keep a request from ending.
        let patience = ahead.took.saturating_mul(SHARE);
        loop {
            self.give_way(ahead);
            let deferred = slot.claims().tally().deferred * slot.granule;
            let due = ahead.pace.due();
            let demanded = !self.work.1.is_empty() && since.get_or_insert_with(Instant::now).elapsed() < patience;
            if (ahead.stop)(self) || !demanded && deferred < self.config.populate_inflight && due.is_zero() {
                slot.mechanism.gate().let_pass();
                return;
            }
            let state = lock(&self.populate.state);
            let pause = due.clamp(LOOK, Duration::from_millis(100));
            drop(self.populate.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner));
        }
    }

    pub(super) fn claim_ahead(&self, slot: &Arc<Slot>, pages: Range<u64>, max: u64) -> Option<Run> {
        let terms = slot.fill_terms(false);
        let mut claims = slot.claims();
        let first = slot.pages.first_run(pages.clone(), State::Absent, 1)?.start;
        // Page by page after a failure.
        let max = if max > 1 { huge::claim_max(slot, &(first..pages.end), max) } else { max };
        let max = max.min(pages.end - first);
        let (id, pages) = claims.claim(&slot.pages, first, max, State::Absent, terms)?;
        let waits = self.join_left(slot, &pages, &mut claims);
        let (wanted, thread) = (waits.map(|(page, _)| page), waits.map_or(0, |(_, thread)| thread));
        Some(Run { slot: slot.clone(), id, pages, wanted, thread, ahead: false, since: Instant::now() })
    }

    /// The pages of every slot that a guest physical range touches.
    fn runs(&self, range: Option<(u64, u64)>) -> Vec<(Arc<Slot>, Range<u64>)> {
        let map = self.memory.map();
        let (gpa, len) = range.unwrap_or((0, u64::MAX));
        map.within_gpa(gpa..gpa.saturating_add(len))
            .map(|(slot, offsets)| (slot.clone(), slot.pages_of(&offsets)))
            .collect()
    }
}

impl Target<'_> {
    /// Calls `act` with each part, for as long as it says Ok, and `go_on` now and then where that takes long.
    fn each(&self, go_on: &dyn Fn() -> Step, act: &mut Act<'_>) -> Step {
        match self {
            Self::Runs(runs) => runs.iter().try_for_each(|(slot, pages)| act(slot, pages)),
            Self::Recording(recording, map) => replay::each_part(recording, map, go_on, act),
        }
    }
}

fn has_absent(slot: &Slot, pages: &Range<u64>) -> bool {
    slot.pages.first_run(pages.clone(), State::Absent, 1).is_some()
}

fn populated(range: Option<(u64, u64)>, error: i32) -> Work {
    let (gpa, len) = range.unwrap_or((0, 0));
    let text = match error {
        0 => "a populate request is done".to_owned(),
        errno => format!("a populate request ended early: {}", std::io::Error::from_raw_os_error(errno)),
    };
    Work::Notice { kind: KUF_EVENT_POPULATED, gpa, len, error, text }
}

fn replayed(error: i32) -> Work {
    let text = match error {
        0 => "a replay is done".to_owned(),
        errno => format!("a replay ended early: {}", std::io::Error::from_raw_os_error(errno)),
    };
    Work::Notice { kind: KUF_EVENT_REPLAYED, gpa: 0, len: 0, error, text }
}

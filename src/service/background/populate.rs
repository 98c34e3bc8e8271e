//! Populate: it fills ranges and recordings in the background. Demand goes first, then recordings, then ranges.

use std::collections::VecDeque;
use std::ops::Range;

use rustix::io::Errno;

use crate::alloc::{refusable, try_collect, NoMemory};
use crate::error::{Error, Result};
use crate::memory::{Map, Slot};
use crate::pages::State;
use crate::record_file::Recording;
use crate::service::background::ended::{populated, replayed};
use crate::service::background::rate::Rate;
use crate::service::background::{recorded, replay_window, skip_removed, Act, Step, Stopped};
use crate::service::config::NewPopulate;
use crate::service::fault::fill::{Fill, NotFilled};
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{exits, fill, huge, retry};
use crate::service::inside::refuse_inside_quiet;
use crate::service::Service;
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, thread, wait, wait_timeout, Arc, Condvar, Mutex};

/// How often populate checks the conditions it waits for: that demand is served, or that deferred runs are resolved.
const LOOK: Duration = Duration::from_micros(200);

/// Populate waits for demand for at most this many times the duration of its last run.
const SHARE: u32 = 16;

/// How often a range is scanned for pages that became absent behind an earlier scan.
const ROUNDS: u32 = 8;

/// The queue of requests.
#[derive(Default)]
pub struct PopulateQueue {
    state: Mutex<Requests>,
    changed: Condvar,
}

#[derive(Default)]
struct Requests {
    requests: VecDeque<NewPopulate>,
    /// Recordings, which go before the requests.
    replays: VecDeque<Recording>,
    /// Complete slots, for which the mechanism may stop catching touches.
    complete: Vec<Arc<Slot>>,
    /// Counts KUF_POPULATE_STOP: a request that began under another number ends.
    era: u64,
}

impl Requests {
    /// The next recording to fill. A sweep goes first, for threads may wait for its pages.
    fn next_replay(&mut self) -> Option<(Recording, u64)> {
        if self.replays.is_empty() || self.requests.iter().any(|request| request.sweep) {
            return None;
        }
        self.replays.pop_front().map(|recording| (recording, self.era))
    }
}

impl PopulateQueue {
    /// Queues a recording.
    pub fn replay(&self, recording: Recording) -> Result<()> {
        let mut state = lock(&self.state);
        refusable(|| state.replays.try_reserve(1)).map_err(NoMemory::from)?;
        state.replays.push_back(recording);
        self.changed.notify_all();
        Ok(())
    }

    /// Queues a complete slot. The populate thread reports it to the mechanism, for that may take time.
    pub fn save_costs_of(&self, slot: &Arc<Slot>) {
        lock(&self.state).complete.push(slot.clone());
        self.changed.notify_all();
    }

    /// Wakes the populate thread.
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

/// The action on a page that cannot be filled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnFailure {
    /// End the request.
    End,
    /// Leave it and go on.
    Leave,
    /// Poison it, for a thread may be waiting, and go on.
    Poison,
}

/// Pages of slots.
type Runs = Vec<(Arc<Slot>, Range<u64>)>;

/// The pages to fill.
enum Target<'a> {
    Runs(Runs),
    Recording(&'a Recording, Arc<Map>),
}

/// How a target is filled.
struct FillPolicy<'a> {
    rate: Rate,
    /// Whether to go on.
    go_on: &'a dyn Fn(&Service) -> Step,
    on_failure: OnFailure,
    /// Recordings that are queued meanwhile go first.
    gives_way: bool,
    /// The duration of the last run.
    took: Duration,
    /// The limits of waiting for memory, for the whole target.
    patience: RetryLimits,
    /// The callback left a run absent.
    later: bool,
}

impl<'a> FillPolicy<'a> {
    /// Ends with the first failure.
    fn new(rate: u64, go_on: &'a dyn Fn(&Service) -> Step) -> Self {
        let rate = Rate { started: Instant::now(), rate, bytes: 0 };
        let (on_failure, gives_way, took, patience) = (OnFailure::End, false, LOOK, RetryLimits::default());
        Self { rate, go_on, on_failure, gives_way, took, patience, later: false }
    }
}

/// `kuf_populate`.
pub fn populate(service: &Service, request: NewPopulate) -> Result<()> {
    refuse_inside_quiet("kuf_populate")?;
    service.check_open()?;
    if !service.serviced() {
        return Err(Error::new(Errno::NOTSUP, "kuf_populate needs a fill callback to ask, or sources"));
    }
    let mut state = lock(&service.background.populate.state);
    if request.stop {
        state.era += 1;
        let (sweeps, stopped) = std::mem::take(&mut state.requests).into_iter().partition(|r| r.sweep);
        state.requests = sweeps;
        for request in stopped {
            service.push(populated(request.range, Err(Stopped::Canceled)));
        }
        for _ in std::mem::take(&mut state.replays) {
            service.push(replayed(Err(Stopped::Canceled)));
        }
    } else if !(request.sweep && state.requests.iter().any(|other| other.sweep)) {
        if runs(service, request.range)?.is_empty() {
            return Err(Error::new(Errno::NOENT, "no memory slot in this range"));
        }
        refusable(|| state.requests.try_reserve(1)).map_err(NoMemory::from)?;
        state.requests.push_back(request);
    }
    service.background.populate.changed.notify_all();
    Ok(())
}

pub fn populate_loop(service: &Arc<Service>) {
    while let Some(job) = next_job(service) {
        match job {
            Job::Populate(request, era) => work_on_request(service, &request, era),
            Job::Replay(recording, era) => work_on_replay(service, &recording, era),
            Job::SaveCosts(slot) => exits::save(&slot),
        }
    }
}

/// Whether the service is open, and no KUF_POPULATE_STOP came since `era`.
fn not_stopped(service: &Service, era: u64) -> Step {
    let goes_on = service.check_open().is_ok() && lock(&service.background.populate.state).era == era;
    goes_on.then_some(()).ok_or(Stopped::Canceled)
}

fn is_open(service: &Service) -> Step {
    service.check_open().map_err(|_| Stopped::Canceled)
}

fn work_on_request(service: &Service, request: &NewPopulate, era: u64) {
    let sweep = request.sweep;
    let go_on = |service: &Service| if sweep { is_open(service) } else { not_stopped(service, era) };
    let on_failure = if sweep { OnFailure::Poison } else { OnFailure::End };
    let mut policy = FillPolicy { on_failure, gives_way: !sweep, ..FillPolicy::new(request.rate, &go_on) };
    let runs = retry::patiently(service, &RetryLimits::default(), || Ok(runs(service, request.range)?));
    let result = runs.map_err(Stopped::from).and_then(|runs| fill_target(service, &Target::Runs(runs), &mut policy));
    if service.check_open().is_ok() && !sweep {
        service.push(populated(request.range, result));
    }
}

fn work_on_replay(service: &Service, recording: &Recording, era: u64) {
    let go_on = |service: &Service| not_stopped(service, era);
    let target = Target::Recording(recording, service.memory.map());
    let result = fill_target(service, &target, &mut FillPolicy::new(0, &go_on));
    if service.check_open().is_ok() {
        service.push(replayed(result));
    }
}

fn next_job(service: &Service) -> Option<Job> {
    let mut state = lock(&service.background.populate.state);
    loop {
        service.check_open().ok()?;
        if let Some(slot) = state.complete.pop() {
            return Some(Job::SaveCosts(slot));
        }
        if let Some((recording, era)) = state.next_replay() {
            return Some(Job::Replay(recording, era));
        }
        if let Some(request) = state.requests.pop_front() {
            return Some(Job::Populate(request, state.era));
        }
        state = wait(&service.background.populate.changed, state);
    }
}

/// Fills all pages of a range on this thread, for `kuf_close` and `kuf_remove_memory`, until `deadline`.
pub fn populate_now(service: &Service, range: Option<(u64, u64)>, deadline: Option<Instant>) -> Step {
    let go_on = |service: &Service| match deadline {
        Some(deadline) if Instant::now() >= deadline => Err(Stopped::TimedOut),
        _ => is_open(service),
    };
    let mut policy = FillPolicy {
        on_failure: OnFailure::Leave,
        patience: RetryLimits::of_end(deadline),
        ..FillPolicy::new(0, &go_on)
    };
    fill_target(service, &Target::Runs(runs(service, range)?), &mut policy)
}

fn fill_target(service: &Service, target: &Target<'_>, policy: &mut FillPolicy<'_>) -> Step {
    let go_on = policy.go_on;
    let go_on = || go_on(service);
    // A discard during a fill leaves a page absent behind the scan, so scan again. The number of rounds is limited, so
    // that a caller that discards all the time cannot keep a request from ending.
    for _ in 0..ROUNDS {
        let mut failed = Ok(());
        let mut fill = |slot: &Arc<Slot>, pages: &Range<u64>| match skip_removed(
            slot,
            &go_on,
            fill_ahead(service, slot, pages, policy),
        ) {
            Err(Stopped::Failed(failure)) if policy.on_failure != OnFailure::End => {
                failed = Err(Stopped::Failed(failure));
                Ok(())
            }
            other => other,
        };
        match target {
            Target::Recording(recording, map) => recorded::each_window(service, recording, map, &go_on, &mut fill)?,
            Target::Runs(_) => target.each(&go_on, &mut fill)?,
        }
        // The request also waits for deferred runs and for runs that demand is filling.
        target.each(&go_on, &mut |slot, pages| {
            while on_their_way(slot, pages) {
                go_on()?;
                give_way(service, policy);
                wait_for_others(slot, pages, policy)?;
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
        if policy.later {
            // Another round would ask for these pages again.
            return Err(Stopped::Later);
        }
    }
    Ok(())
}

/// Waits a while for pages that other threads own. Err: the limits of waiting are reached.
fn wait_for_others(slot: &Slot, pages: &Range<u64>, policy: &FillPolicy<'_>) -> Step {
    let claims = slot.claims();
    if !claims.only_held_off(pages) {
        drop(slot.sleep(claims, Some(Instant::now() + Duration::from_millis(20))));
        return Ok(());
    }
    drop(claims);
    if !policy.patience.tries_again() {
        return Err(Stopped::GaveUp);
    }
    thread::sleep(Duration::from_millis(1));
    Ok(())
}

fn fill_ahead(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>, policy: &mut FillPolicy<'_>) -> Step {
    let mut failed = Ok(());
    let mut from = pages.start;
    while has_absent(slot, &(from..pages.end)) {
        let_demand_pass(service, slot, policy);
        (policy.go_on)(service)?;
        if let Some(errno) = slot.gone() {
            return Err(errno.into());
        }
        let max = if failed.is_ok() { (service.config.populate_run / slot.granule).max(1) } else { 1 };
        let claimed =
            retry::patiently(service, &policy.patience, || Ok(claim_ahead(service, slot, from..pages.end, max)?))?;
        let Some(mut run) = claimed else { return failed };
        if policy.on_failure == OnFailure::Poison && max == 1 {
            run.wanted = Some(run.pages.start);
        }
        from = run.pages.start;
        run.patience = policy.patience.clone();
        let filled = fill::fill(service, &run);
        policy.patience.go_on_from(&run.patience);
        policy.took = run.since.elapsed();
        if policy.patience.gave_up() {
            return Err(Stopped::GaveUp);
        }
        if run.patience.was_out() {
            return Err(Stopped::TimedOut);
        }
        match filled {
            Ok(()) | Err(NotFilled::Poisoned(_)) => {}
            Err(NotFilled::Later) if policy.on_failure != OnFailure::Poison => {
                policy.later = true;
                from = run.pages.end;
                continue;
            }
            Err(not) => {
                failed = Err(match not {
                    NotFilled::Failed(failure) | NotFilled::Poisoned(failure) => failure.into(),
                    // Threads may wait for these pages: they are asked for as demand.
                    NotFilled::Later => Stopped::Later,
                });
                if policy.on_failure == OnFailure::End {
                    return failed;
                }
                // A failed run is retried page by page; a page that fails is skipped.
                from += u64::from(run.pages.end - run.pages.start == 1);
            }
        }
        policy.rate.bytes += (run.pages.end - run.pages.start) * slot.granule;
    }
    failed
}

/// Newly queued replays go first.
fn give_way(service: &Service, policy: &FillPolicy<'_>) {
    if !policy.gives_way {
        return;
    }
    let next = || lock(&service.background.populate.state).next_replay();
    while let Some((recording, era)) = next() {
        work_on_replay(service, &recording, era);
    }
}

fn on_their_way(slot: &Arc<Slot>, pages: &Range<u64>) -> bool {
    slot.pages.first_open(pages.clone()).is_some() && {
        let claims = slot.claims();
        slot.gone().is_none() && claims.coming(pages)
    }
}

/// Lets demand go first, and waits while more than `populate_inflight` is deferred or the rate is exceeded.
fn let_demand_pass(service: &Service, slot: &Arc<Slot>, policy: &FillPolicy<'_>) {
    let mut since = None;
    // The wait is limited, so that endless demand cannot keep a request from ending.
    let patience = policy.took.saturating_mul(if policy.patience.is_endless() { SHARE } else { 1 });
    loop {
        give_way(service, policy);
        let deferred = slot.claims().tally().deferred * slot.granule;
        let due = policy.rate.due();
        let demanded = service.threads.queued() > 0 && since.get_or_insert_with(Instant::now).elapsed() < patience;
        if (policy.go_on)(service).is_err() || !demanded && deferred < service.config.populate_inflight && due.is_zero()
        {
            slot.mechanism.gate().let_pass();
            return;
        }
        let state = lock(&service.background.populate.state);
        let pause = due.clamp(LOOK, Duration::from_millis(100));
        drop(wait_timeout(&service.background.populate.changed, state, pause));
    }
}

pub fn claim_ahead(
    service: &Service,
    slot: &Arc<Slot>,
    pages: Range<u64>,
    max: u64,
) -> std::result::Result<Option<Fill>, NoMemory> {
    let terms = slot.fill_terms(false);
    let mut claims = slot.claims();
    let Some(Range { start: first, .. }) = slot.pages.first_run(pages.clone(), State::Absent, 1) else {
        return Ok(None);
    };
    // After a failure, go on page by page.
    let max = if max > 1 { huge::claim_max(slot, &(first..pages.end), max) } else { max };
    let max = max.min(pages.end - first);
    claims.reserve(&slot.pages, &(first..first + max), false)?;
    let claimed = claims.claim(&slot.pages, first, max, State::Absent, terms);
    let Some((id, pages)) = claimed else { return Ok(None) };
    let waits = replay_window::join_intercepted(service, slot, &pages, &mut claims);
    let (wanted, thread) = (waits.map(|(page, _)| page), waits.map_or(0, |(_, thread)| thread));
    Ok(Some(Fill {
        slot: slot.clone(),
        id,
        pages,
        wanted,
        thread,
        speculative: false,
        since: Instant::now(),
        patience: RetryLimits::default(),
    }))
}

/// The pages of every slot that a guest physical range touches.
fn runs(service: &Service, range: Option<(u64, u64)>) -> std::result::Result<Runs, NoMemory> {
    let map = service.memory.map();
    let (gpa, len) = range.unwrap_or((0, u64::MAX));
    let within = map.within_gpa(gpa..gpa.saturating_add(len));
    try_collect(within.map(|(slot, offsets)| (slot.clone(), slot.pages_of(&offsets))))
}

impl Target<'_> {
    /// Calls `act` with each part as long as it returns Ok, and `go_on` now and then during long scans.
    fn each(&self, go_on: &dyn Fn() -> Step, act: &mut Act<'_>) -> Step {
        match self {
            Self::Runs(runs) => runs.iter().try_for_each(|(slot, pages)| skip_removed(slot, go_on, act(slot, pages))),
            Self::Recording(recording, map) => recorded::each_part(recording, map, go_on, act),
        }
    }
}

fn has_absent(slot: &Slot, pages: &Range<u64>) -> bool {
    slot.pages.first_run(pages.clone(), State::Absent, 1).is_some()
}
